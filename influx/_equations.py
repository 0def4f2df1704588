"""The equations of a traced program, to be read or run one by one."""

from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

# Programs inside programs that can be read through. A custom derivative is not: its rule is its own.
CHECKPOINTS = ("remat", "remat2", "checkpoint")
CALLS = ("jit", "pjit", "closed_call", "core_call", *CHECKPOINTS)


def inner_program(equation) -> tuple[Jaxpr, Sequence[Array]]:
    """The program that an equation of `CALLS`, or a scan, runs, and its constants."""
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())


def apply(program: Jaxpr, equation, operands) -> list[Array]:
    """One equation by itself."""
    given = {v: x for v, x in zip(equation.invars, operands) if not isinstance(v, Literal)}
    alone = program.replace(
        constvars=[], invars=list(given), outvars=list(equation.outvars), eqns=[equation],
        effects=equation.effects,
    )  # fmt: skip
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*given.values())
