"""What every diagnosis is made of."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._gradients import map_gradients
from .._influence import Influence

VERDICT_ORDER = ("good", "warning", "bad")


class Finding(eqx.Module):
    """One measured property: its `name`, the `figure` as text, a `verdict` ("good", "warning" or
    "bad"), what it `means`, and a `remedy` (empty where the verdict is good)."""

    name: str
    figure: str
    verdict: str
    means: str
    remedy: str


class Diagnosis(eqx.Module):
    """The findings of `diagnose`. `str(diagnosis)` is a plain table; `diagnosis["spectrum"]` one of
    them; `.verdict` the worst."""

    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        return max((x.verdict for x in self.findings), key=VERDICT_ORDER.index)

    def __getitem__(self, name: str) -> Finding:
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"No finding {name!r}; there are {[x.name for x in self.findings]}.")

    def __str__(self) -> str:
        rows = [f"{x.verdict:8} {x.name:20} {x.figure}\n{'':9}{x.means}" for x in self.findings]
        remedies = [f"\n{'':9}→ {x.remedy}" if x.remedy else "" for x in self.findings]
        return "\n".join(row + remedy for row, remedy in zip(rows, remedies))


def judge(value: float, warning: float, bad: float) -> str:
    """ "good" below `warning`, "bad" from `bad` on, and for NaN."""
    return "good" if value < warning else ("warning" if value < bad else "bad")


def finding(name, figure, verdict, means, remedy) -> Finding:
    return Finding(name, figure, verdict, means, "" if verdict == "good" else remedy)


@eqx.filter_jit
def _is_finite(f: Influence) -> Bool[Array, " n"]:
    norms = map_gradients(lambda _, g: jnp.linalg.norm(g), f.risk, f.model)
    return jnp.isfinite(f.risk.losses(f.model)) & jnp.isfinite(norms)


def finite(f: Influence) -> Finding:
    bad = np.flatnonzero(~np.asarray(_is_finite(f)))
    return finding(
        "finite",
        f"{bad.size} of {f.risk.n} examples",
        "bad" if bad.size else "good",
        "Examples whose loss or gradient at this model is NaN or infinite"
        + (f", the first {bad[:5].tolist()}." if bad.size else ": none."),
        "Look at those examples; a log(0), 0/0 or sqrt(0) in the loss needs a safe form.",
    )
