"""Whether a point can be stepped away from, and whether the steps converged."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_whole, is_concrete
from .base import AbstractResponse


def check_refine(refine: Any) -> int:
    return check_whole("refine", refine, least=0, hint=" It counts chord steps.")


def check_removal_step(
    response: AbstractResponse, step: Any, refine: Any, *, name: str = "step"
) -> int:
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
    "chord steps diverge: the curvature of the other points is too far from the one held (of a network "
    "GaussNewton may be), or the Newton step that they start from goes too far, which more of them may "
    "mend. "
    "`certify(f, ..., refine=...)` tells point by point how far it got, and `leave_one_out(risk, model, "
    "trainer, indices=...)` retrains; `refine=0` is a Newton step that nothing judges. More `damping=` "
    "shortens the steps, and takes many more of them to the same end."
)


_UNSETTLED = (
    "With every point kept chord steps diverge: the model is too far from a minimum for them "
    '(`diagnose(f)["stationarity"]` says how far), or the curvature held too far from the Hessian. '
    "`fit` it further, use Hessian() or more `damping=`, or `refine=0`."
)


def require_convergence(
    found, settles: Bool[Array, ""], converge: Bool[Array, " k"], indices: Int[Array, " k"]
):
    """`found`, where no chord steps diverge: with every point kept, or without each of some points. Else
    a `RuntimeError`, which names points."""
    if not is_concrete((settles, converge)):
        found = eqx.error_if(found, ~settles, _UNSETTLED)
        message = f"Without one of the training points {_DIVERGE}"
        return eqx.error_if(found, ~jnp.all(converge), message)
    if not bool(settles):
        raise RuntimeError(_UNSETTLED)
    failed = np.asarray(indices)[~np.asarray(converge)]
    if failed.size:
        raise RuntimeError(f"Without each of {_named(failed, converge.size)} {_DIVERGE}")
    return found


_NO_STEP = (
    "the Hessian is not positive definite, or is singular to rounding, and there is no Newton step: the "
    "point alone decides some direction (leverage 1), which takes an l2 > 0; or the model is no minimum "
    "without it, as may be where the loss is not convex in the parameters, which takes GaussNewton() or "
    "more `damping=`."
)


def require_steps(change: Float[Array, " n"]) -> Float[Array, " n"]:
    """`change`, where each point has a Newton step; else a `RuntimeError`, which names points."""
    missing = jnp.isnan(change)
    if not is_concrete(change):
        return eqx.error_if(change, jnp.any(missing), f"Without one of the points {_NO_STEP}")
    failed = np.flatnonzero(missing)
    if failed.size:
        raise RuntimeError(f"Without each of {_named(failed, change.size)} {_NO_STEP}")
    return change


def _named(points: np.ndarray, total: int) -> str:
    some = ", ".join(map(str, points[:5])) + ", …" * (points.size > 5)
    return f"{points.size} of {total} points ({some})"
