"""How the demo's tables and figures write a number."""


def signed(value) -> str:
    """Three digits with their sign: +46.0, −723, −2.82e+03."""
    return f"{float(value):+#.3g}".rstrip(".").replace("-", "−", 1)
