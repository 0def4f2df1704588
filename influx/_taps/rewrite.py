"""Layers whose program cannot be read, written anew by rules of the user's."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._checks import is_concrete
from .._chunks import take
from .._custom_types import Model
from .._risk import EmpiricalRisk

Rules = tuple[tuple[type, Callable], ...]


class Rewritten(eqx.Module):
    """A layer that is called through its rule, and is itself in every other respect."""

    layer: Any
    rule: Callable = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        return self.rule(self.layer, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.layer, name)


class Whole(eqx.Module):
    """`whole` of a risk, with the layers that have a rule rewritten."""

    whole: Callable
    rules: Rules = eqx.field(static=True)

    def __call__(self, model):
        rules = dict(self.rules)
        has_rule = lambda x: type(x) in rules
        change = lambda x: Rewritten(x, rules[type(x)]) if has_rule(x) else x
        return jtu.tree_map(change, self.whole(model), is_leaf=has_rule)


def ruled(risk: EmpiricalRisk, rules: Rules) -> EmpiricalRisk:
    """The risk of the same model, its layers called through `rules`."""
    if not rules:
        return risk
    return eqx.tree_at(lambda r: r.whole, risk, Whole(risk.whole, rules))


def checked_rules(rules: Mapping[type, Callable] | None) -> Rules:
    """`rules` in a form that programs can be compiled for."""
    pairs = tuple((rules or {}).items()) if isinstance(rules, Mapping | None) else None
    if pairs is None or not all(isinstance(t, type) and callable(fn) for t, fn in pairs):
        raise ValueError(
            "`rules` maps layer types to functions, for instance "
            f"{{MyLayer: lambda layer, x: layer.weight @ x}}; got {rules!r}."
        )
    return pairs


def check_rules(risk: EmpiricalRisk, model: Model, rules: Rules) -> None:
    """Each rule has a layer of its type, and the model answers through them what it answers.

    **Raises:** `ValueError` naming the type that the model does not hold, or how far the outputs of its
    first training points are apart.
    """
    if not rules:
        return
    types = tuple(t for t, _ in rules)
    has_rule = lambda x: type(x) in types
    found = {type(x) for x in jtu.tree_leaves(risk.whole(model), is_leaf=has_rule) if has_rule(x)}
    for t in types:
        if t not in found:
            raise ValueError(
                f"`rules` holds a rule for {t.__name__}, and the model has no layer of that very type "
                "(subclasses do not count). Leave it out."
            )
    rewritten = ruled(risk, rules)
    if not is_concrete((risk.data, model)):
        return
    few = take(risk.data[0], slice(0, 4))
    outputs = lambda r: eqx.filter_jit(lambda m, X: jax.vmap(lambda x: r.output(m, x))(X))(
        model, few
    )
    names = ", ".join(t.__name__ for t in types)
    try:
        theirs = outputs(rewritten)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"The model cannot be called through the rule for {names}: {error}"
        ) from error
    mine = outputs(risk)
    same = jtu.tree_structure(mine) == jtu.tree_structure(theirs) and all(
        a.shape == b.shape for a, b in zip(jtu.tree_leaves(mine), jtu.tree_leaves(theirs))
    )
    apart = max(map(_apart, jtu.tree_leaves(mine), jtu.tree_leaves(theirs))) if same else jnp.inf
    if not apart <= 1:
        raise ValueError(
            f"Through the rule for {names} the model answers something else than by itself. A rule "
            "computes what its layer computes, bias and all, in plain matrix products; see "
            "docs/extending.md."
        )


def _apart(a, b) -> float:
    """The largest difference, in units of what rounding and another order of sums explain."""
    unit = jnp.sqrt(jnp.finfo(a.dtype).eps) * jnp.max(jnp.abs(a))
    return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(unit, jnp.finfo(a.dtype).tiny))
