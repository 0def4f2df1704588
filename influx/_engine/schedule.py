"""The choice of a way of scoring, and of chunks, by cost within a memory limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._chunks import Limits, even_length, map_blocks
from .._cost import BALANCE, Cost, Parts, cost_of

# More training points at a time than this are no faster: their rows no longer fit a processor's cache.
MOST_POINTS = 512
# Nor are chunks of more bytes than this, where no queries share a point's work.
_MOST_BYTES = 128 * 2**20
# What starting one more chunk costs a piece, in flops: some 60 µs (measured as BALANCE was).
_STEP = 1e7


@dataclass(frozen=True)
class Piece:
    """A part of the work: of which parameters (`paths`), in which `way`, at what cost. `held` are the
    bytes a query keeps ready for it, which every chunk of training points reads again; `passing` those
    it takes only while it is made ready."""

    paths: tuple[str, ...]
    way: str
    cost: Cost
    held: float = 0.0
    passing: float = 0.0

    def total(self, parts: Parts, m: int, n: int, q: int) -> float:
        """An amount for m queries, q at a time: what is a point's own is computed again each time."""
        return parts.fixed + m * parts.query + n * (-(-m // q) * parts.point + m * parts.pair)

    def flops(self, m: int, n: int, q: int) -> float:
        return self.total(self.cost.flops, m, n, q)

    def moved(self, m: int, n: int, q: int, b: int) -> float:
        return self.total(self.cost.moved, m, n, q) + m * self.held * -(-n // b)


@dataclass(frozen=True)
class Alternative:
    """One way of scoring: what it does in any case, and for each layer the pieces to choose from.
    `settle(ways, points)` is what does so, given the choice and the chunk. Where `whole`, all points are
    taken at once if they fit: what is little work a point is slower in a loop."""

    settle: Callable[[tuple[str, ...], int], Any]
    shared: tuple[Piece, ...]
    layers: tuple[tuple[Piece, ...], ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a plan, in total over all queries and training points."""

    paths: tuple[str, ...]
    way: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Schedule:
    """What was chosen: by whom scores are taken, `queries` and `points` at a time, the queries made
    ready `prepared` at a time, what each part costs, and an estimate of the bytes of temporaries."""

    scorer: Any
    queries: int
    prepared: int
    points: int
    rows: tuple[Row, ...]
    work: float
    peak: float


def choose(
    alternatives: tuple[Alternative, ...],
    limits: Limits,
    m: int,
    n: int,
    kept: int,
    dtype,
    least_share: str = "one query's",
) -> Schedule:
    """The cheapest schedule within the limits. `kept` numbers are kept of a query's scores.

    A chunk size of the user's, without a memory limit, may take twice what such a chunk takes with one
    query in the way that is chosen: else few queries fit beside a large one, and each few take a pass
    over the training points.

    **Raises:** `ValueError` where a memory limit of the user's holds not even `least_share`.
    """
    # As they come out of the chunks, in their place, and divided by a scale.
    scores = Cost(live=Parts(query=3.0 * kept * jnp.dtype(dtype).itemsize))
    asked = limits.chunk_size is not None and limits.memory is None
    found, fit = [], []
    for one in alternatives:
        own = [_settled(one, limits, m, n, q, scores) for q in _query_chunks(m)]
        with_one_query = own[-1].peak
        room = max(limits.bytes, 2 * with_one_query) if asked else limits.bytes
        found += own
        fit += [s for s in own if s.peak <= room]
    if fit:
        return min(fit, key=lambda s: s.work)
    least = min(found, key=lambda s: s.peak)
    if limits.memory is not None:
        alone = "" if limits.chunk_size is None else f" with chunk_size={limits.chunk_size}"
        raise ValueError(
            f"`memory={limits.memory}` bytes do not hold {least_share} share of the work{alone}: that "
            f"takes {least.peak:,.0f}. Use `influence(..., memory={math.ceil(least.peak)})` or more"
            f"{', a smaller chunk_size' if alone else ''}, or keep fewer parameters with `restrict`."
        )
    return least


def map_points(block: Callable, n: int, limits: Limits, dtype) -> PyTree[Array]:
    """`block` of the indices 0…n−1 of training points, as many at a time as its program has room for."""
    index = jax.ShapeDtypeStruct((), jnp.arange(0).dtype)
    cost = cost_of(lambda _, i: block(i[None]), (), index)
    way = Alternative(lambda *_: None, (Piece(("all parameters",), "by points", cost),))
    points = choose((way,), limits, 1, n, 0, dtype, "one training point's").points
    if limits.chunk_size is None:
        points = min(points, max(1, int(_MOST_BYTES // max(1.0, cost.live.point))))
    return map_blocks(block, n, points)


def _query_chunks(m: int) -> list[int]:
    """m, and what halving leaves of it."""
    chunks, parts = [m], 1
    while chunks[-1] > 1:
        parts *= 2
        chunks.append(even_length(m, -(-m // parts)))
    return chunks


def _settled(one: Alternative, limits, m: int, n: int, q: int, scores: Cost) -> Schedule:
    work = lambda p: p.flops(m, n, q) + BALANCE * p.moved(m, n, q, min(n, MOST_POINTS))
    chosen = tuple(min(pieces, key=work) for pieces in one.layers)
    pieces = (*one.shared, *chosen)
    live, passing = scores.live, sum(piece.passing for piece in pieces)
    for piece in pieces:
        live = live.plus(piece.cost.live)
    held = live.query - passing
    most = n if one.whole else MOST_POINTS
    room = limits.bytes - live.fixed - q * held
    b = _points(room, live, limits, n, q, most)
    of_points = b * (live.point + q * live.pair)
    p = _prepare_length(passing, max(of_points, room), q)
    rows = tuple(Row(r.paths, r.way, r.flops(m, n, q), r.moved(m, n, q, b)) for r in pieces)
    total = sum(row.flops + BALANCE * row.bytes for row in rows)
    total += _STEP * len(pieces) * (-(-m // q) * -(-n // b) + -(-m // p))
    scorer = one.settle(tuple(r.way for r in chosen), b)
    peak = live.fixed + q * held + max(p * passing, of_points)
    return Schedule(scorer, q, p, b, rows, total, peak)


def _prepare_length(passing: float, room: float, q: int) -> int:
    """How many queries are prepared at a time (at least one): before the points, in the same room."""
    return even_length(q, max(1, int(room // max(1.0, passing))))


def _points(room: float, live: Parts, limits: Limits, n: int, q: int, most: int) -> int:
    """How many training points fit beside q queries (at least one): `most`, or in smaller chunks."""
    if limits.chunk_size is not None:
        return even_length(n, limits.chunk_size)
    each = max(1.0, live.point + q * live.pair)
    fit = int(room // each)
    return even_length(n, max(1, min(most if most <= fit else MOST_POINTS, fit)))
