"""What a program costs for many queries and training points, read off its shapes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

# Flops in the time that one byte takes to or from memory, by which the two are added. Measured: a
# product of two float32 matrices of side 3,000 makes 161 Gflop/s on two cores, and `a + 1` of 60 million
# numbers moves 6.0 GB/s. What a program does is compared by it, never answered.
BALANCE = 27.0

# `vprim` is a solve of lineax.
_FREE = frozenset(
    (
        "broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice "
        "expand_dims gather iota pad reshape rev scatter select_n slice split squeeze stop_gradient "
        "transpose vprim"
    ).split()
)
_IDENTITIES = frozenset(("stop_gradient",))
_STORED = frozenset(("dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add"))


class Parts(NamedTuple):
    """An amount by what it belongs to: `fixed`, each `query`, each training `point`, each `pair`."""

    fixed: float = 0.0
    query: float = 0.0
    point: float = 0.0
    pair: float = 0.0

    def plus(self, other: "Parts") -> "Parts":
        return Parts(*(a + b for a, b in zip(self, other)))


class Cost(NamedTuple):
    """- `flops`: additions and multiplications, each by itself
    - `moved`: bytes of products, which are written and read again (all else is fused into its use)
    - `live`: bytes held at once, at most
    """

    flops: Parts = Parts()
    moved: Parts = Parts()
    live: Parts = Parts()

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(a.plus(b) for a, b in zip(self, other)))


def cost_of(fn: Callable, query: PyTree, point: PyTree, *fixed: PyTree) -> Cost:
    """The cost of `jax.vmap` of fn(query, point, *fixed) over queries and points, from one of each.

    Every value of the program belongs to what it depends on, as under `jax.vmap`: what depends on the
    point alone is computed once a point, whatever the queries. All arguments are pytrees of
    arrays or of their shapes; nothing is run. A loop of unknown length counts as one step, and what
    lineax solves, whose inside no program shows, as nothing.
    """
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    parts = jtu.tree_map(struct, (query, point, *fixed))
    closed = jax.make_jaxpr(fn)(*parts)
    q, p, rest = (len(jtu.tree_leaves(tree)) for tree in (*parts[:2], parts[2:]))
    labels = [_QUERY] * q + [_POINT] * p + [0] * rest
    return _read(closed.jaxpr, labels)[0]


_QUERY, _POINT = 1, 2  # their union, 3, is a pair


@dataclass
class _Tally:
    """Sums by label, and the bytes alive now and at most."""

    flops: list[float]
    moved: list[float]
    now: list[float]
    peak: list[float]

    def hold(self, label: int, size: float) -> None:
        self.now[label] += size
        self.peak[label] = max(self.peak[label], self.now[label])

    def add(self, inner: Cost, times: int) -> None:
        for mine, other in ((self.flops, inner.flops), (self.moved, inner.moved)):
            _add(mine, other, times)
        for label, size in enumerate(inner.live):
            self.peak[label] = max(self.peak[label], self.now[label] + size)

    @property
    def cost(self) -> Cost:
        return Cost(Parts(*self.flops), Parts(*self.moved), Parts(*self.peak))


def _add(mine: list[float], other: Parts, times: int) -> None:
    for label, amount in enumerate(other):
        mine[label] += times * amount


def _read(jaxpr: Jaxpr, labels: list[int]) -> tuple[Cost, list[int]]:
    """The cost of a program whose inputs have these labels, and the labels of its results."""
    known = dict(zip(jaxpr.invars, labels))
    of = lambda v: 0 if isinstance(v, Literal) else known.get(v, 0)
    last = {
        v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, Literal)
    }
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    made: set[Any] = set()
    tally = _Tally(*([0.0] * 4 for _ in range(4)))
    for i, eqn in enumerate(jaxpr.eqns):
        own = [of(v) for v in eqn.invars]
        known |= zip(eqn.outvars, _equation(eqn, own, tally))
        # What nobody reads is not computed, and an identity is what it is of: lineax passes its factor
        # through one, which is all of a matrix.
        identity = eqn.primitive.name in _IDENTITIES
        held = [v for v in eqn.outvars if (v in last or v in kept) and not identity]
        for v in held:
            tally.hold(known[v], _size(v.aval))
        made.update(held)
        for v in _variables(eqn) - kept:
            if v in made and last[v] == i:
                tally.now[known[v]] -= _size(v.aval)
    return tally.cost, [of(v) for v in jaxpr.outvars]


def _variables(eqn) -> set:
    return {v for v in eqn.invars if not isinstance(v, Literal)}


def _equation(eqn, labels: list[int], tally: _Tally) -> list[int]:
    """Count one operation, and label what it makes."""
    label = 0
    for one in labels:
        label |= one
    inner = _inner(eqn)
    if inner:
        return _call(eqn, inner, labels, label, tally)
    if not eqn.outvars:  # a callback
        return []
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    tally.flops[label] += _flops(eqn)
    if name in _STORED:
        tally.moved[label] += 2 * _size(out)
    return [label] * len(eqn.outvars)


def _call(eqn, inner: list[Jaxpr], labels, label: int, tally: _Tally) -> list[int]:
    """An operation that holds programs: all of a call or a scan, the dearest of a choice."""
    name = eqn.primitive.name
    same = len(inner[0].invars) == len(labels) and name not in ("while", "cond")
    if name == "scan":
        start = eqn.params["num_consts"]
        stop = start + eqn.params["num_carry"]
        labels = [label if start <= i < stop else one for i, one in enumerate(labels)]
    read = [_read(j, labels if same else [label] * len(j.invars)) for j in inner]
    cost, outs = max(read, key=lambda pair: sum(pair[0].flops))
    tally.add(cost, eqn.params["length"] if name == "scan" else 1)
    fits = same and name != "scan" and len(outs) == len(eqn.outvars)
    return outs if fits else [label] * len(eqn.outvars)


def _inner(eqn) -> list[Jaxpr]:
    values = [x for v in eqn.params.values() for x in (v if isinstance(v, tuple | list) else (v,))]
    closed = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in values]
    return [x for x in closed if isinstance(x, Jaxpr)]


def _flops(eqn) -> float:
    name, ins = eqn.primitive.name, [v.aval for v in eqn.invars]
    out = eqn.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out.size * math.prod(ins[0].shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        features = eqn.params["dimension_numbers"].rhs_spec[0]
        return 2.0 * out.size * ins[1].size / ins[1].shape[features]
    if name == "triangular_solve":
        return float(out.size * ins[0].shape[-1])
    if name == "cholesky":
        return out.size * out.shape[-1] / 3
    if name in _FREE:
        return 0.0
    return float(max([getattr(aval, "size", 0) for aval in (out, *ins)]))


def _size(aval) -> float:
    return float(getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 0))
