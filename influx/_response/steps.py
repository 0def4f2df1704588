"""Whether a point can be stepped away from, and whether the steps converged."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .._checks import check_whole, is_concrete
from .base import AbstractResponse


def check_refine(refine: Any) -> int:
    return check_whole("refine", refine, least=0, hint=" It counts chord steps.")


def check_step(response: AbstractResponse, step: Any, refine: Any, name: str = "step") -> int:
    """Refuse a step that the response cannot take, before any work; how many chord steps follow it."""
    if step not in ("first-order", "newton"):
        raise ValueError(f'`{name}` must be "first-order" or "newton", got {step!r}.')
    refine = check_refine(refine)
    if step == "newton":
        response.check_displace()
    elif refine > 0:
        raise ValueError(
            f"`refine` counts chord steps after a Newton step; got refine={refine} at "
            f'{name}="first-order". Use {name}="newton", or leave it out.'
        )
    return refine


_DIVERGE = (
    "chord steps diverge: the other points have a Hessian too far from the one held. Use `refine=0`, "
    "or `certify(f, ..., refine=...)`, which tells point by point how far it got; `leave_one_out(risk, "
    "model, trainer, indices=...)` retrains. More `damping=` shortens the steps, and takes many more of "
    "them to the same end."
)


def require_convergence(
    found, converge: Bool[Array, "*k"], indices: Int[Array, " k"] | None = None
):
    """`found`, where no chord steps diverge; else a `RuntimeError` that names points."""
    if not is_concrete(converge):
        message = f"Without one of the training points {_DIVERGE}"
        return eqx.error_if(found, ~jnp.all(converge), message)
    failed = np.flatnonzero(~np.asarray(converge))
    failed = failed if indices is None else np.asarray(indices)[failed]
    if failed.size:
        some = ", ".join(map(str, failed[:5])) + ", …" * (failed.size > 5)
        count = f"{failed.size} of {converge.size} points"
        raise RuntimeError(f"Without each of {count} ({some}) {_DIVERGE}")
    return found
