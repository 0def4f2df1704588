"""What the solvers here ask of their settings and operators."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx


def check_limits(rtol: Any, atol: Any, max_steps: int | None) -> None:
    if any(isinstance(t, int | float) and t < 0 for t in (rtol, atol)):
        raise ValueError(f"Tolerances must be at least 0, got rtol={rtol}, atol={atol}.")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")


def check_symmetric(name: str, operator: lx.AbstractLinearOperator) -> None:
    """Whether the operator is real and symmetric."""
    leaves = jtu.tree_leaves(operator.in_structure())
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in leaves):
        raise ValueError(f"{name} solves with real operators, got a complex one. Use `lx.GMRES`.")
    if not lx.is_symmetric(operator):
        raise ValueError(
            f"{name} solves with symmetric operators. If this one is, tag it: "
            "`lx.TaggedLinearOperator(operator, lx.symmetric_tag)`; if not, use `lx.GMRES`."
        )


def refuse_options(name: str, options: dict[str, Any]) -> None:
    if options:
        raise ValueError(f"{name} takes no options, got {sorted(options)}. Leave `options` out.")
