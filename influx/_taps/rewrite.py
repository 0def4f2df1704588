"""Layers whose program cannot be read, written anew by rules of the user's."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

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
