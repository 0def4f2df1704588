"""What is optional: the command line and the figures need packages that influx itself does not."""

from importlib.util import find_spec

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "typer": "typer", "rich": "rich"}


def missing_extras(*modules: str) -> str | None:
    """One line that says what is missing and how to get it; `None` where nothing is."""
    missing = [NEEDED[name] for name in modules or NEEDED if find_spec(name) is None]
    if not missing:
        return None
    return f"influx needs {', '.join(missing)} for this: pip install 'influx[demo]'"
