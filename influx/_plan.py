"""What a call will do and cost, from shapes alone."""

import equinox as eqx
from jaxtyping import Array, PyTree

from ._chunks import leading_length, row_struct
from ._influence import Influence, check_influence, scheduled


class Step(eqx.Module):
    """One row of a plan: the `parameters` it is about, the `way`, and what it costs over all queries and
    training points: `flops`, and `bytes` that are written and read again."""

    parameters: tuple[str, ...]
    way: str
    flops: float
    bytes: float


class Plan(eqx.Module):
    """What `plan` answers. `str(plan)` is a plain table.

    - `rows`: the steps, layer by layer where layers are scored by themselves
    - `queries`, `training_points`: how many are worked on at a time, of `shape` [m, n] in all; under
      `groups(f, masks, order=2)` groups take the place of training points (`columns` says so)
    - `peak_bytes`: an estimate of the temporaries: below `memory` where that was given, else below the
      256 MiB of the default, or what one query and one chunk need at least where that is more (twice
      that under a `chunk_size`); the scores themselves, `score_bytes`, come on top
    """

    rows: tuple[Step, ...]
    queries: int
    training_points: int
    shape: tuple[int, int]
    peak_bytes: float
    memory: int
    score_bytes: float
    columns: str = "training points"

    @property
    def flops(self) -> float:
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        total = Step(("total",), "", self.flops, self.bytes)
        width = max(len(row.way) for row in self.rows)
        line = lambda r: (
            f"{si(r.flops)}flop {si(r.bytes)}B  {r.way:{width}}  {_names(r.parameters)}".rstrip()
        )
        (m, n), chunks = self.shape, (self.queries, self.training_points)
        return "\n".join((
            *map(line, self.rows),
            line(total),
            f"queries {m:,}, {chunks[0]:,} at a time; {self.columns} {n:,}, {chunks[1]:,} at a time",
            f"temporaries about {si(self.peak_bytes).strip()}B of {si(self.memory).strip()}B, "
            f"scores {si(self.score_bytes).strip()}B",
        ))  # fmt: skip


def si(value: float) -> str:
    """Three digits and a prefix: 12_345 is "12.3 k"."""
    power = sum(value >= 999.5 * 1000**i for i in range(5))
    value /= 1000**power
    digits = 0 if value >= 99.95 or not power else (1 if value >= 9.995 else 2)
    return f"{value:5.{digits}f} {' kMGTP'[power]}"


def _names(paths: tuple[str, ...]) -> str:
    return ", ".join(paths) if len(paths) <= 2 else f"{paths[0]} … {paths[-1]}"


def plan(f: Influence, queries: PyTree[Array]) -> Plan:
    """What `f(queries)` will do: the way of each layer, how much is worked on at a time, and what it
    takes. Only shapes are looked at; nothing is computed.

    ```python
    print(influx.plan(f, (Xq, yq)))
    ```

    | way | is |
    |---|---|
    | `rank one, ρ terms` | products of small matrices: layers applied once an example, `tolerance` |
    | `c of N coordinates` | gradients at the few that matter: layers with shared weights, `tolerance` |
    | `dense per layer, by factors` | a layer's H⁻¹∇m as a matrix, times output gradients, activations |
    | `dense per layer, by gradients` | the same, times each training point's gradient, formed |
    | `… in its eigenbasis` | training points are rotated, so that queries need not be rotated back |
    | `per-example gradients` | ∇ℓᵢ of all parameters, times H⁻¹∇m: any curvature |
    | `forward mode` | the derivative of all losses in the direction H⁻¹∇m: few queries |
    | `a solve, per step` | of an iterative solver, whose number of steps nobody knows beforehand |
    | `one Newton step a point, …` | `removal(f, "newton")`, without the solves inside it |
    | `second order of a group, …` | `groups(f, masks, order=2)`, the same; points are groups then |

    The engine calls the same function, so that it does what the plan says. Ways give the same scores,
    to rounding; the cheapest is taken by flops + 27 × bytes, 27 being the flops that two cores make in
    the time of one byte to or from memory.

    **Arguments:** `queries` as for `f(queries)`.

    **Raises:** `ValueError` as `f(queries)` does.

    **Cost:** that of tracing the model a few times.
    """
    check_influence("plan", f)
    f.measurement.check(f.risk, f.model, queries)
    _, schedule = scheduled(f, queries)
    m, n = leading_length(queries), f.risk.n
    columns = n if f.masks is None else len(f.masks)
    joint = f.masks is not None and f.order == 2  # then a group is what is scored, not a point
    rows = tuple(Step(row.paths, row.way, row.flops, row.bytes) for row in schedule.rows)
    value = eqx.filter_eval_shape(f.measurement, f.risk, f.model, row_struct(queries))
    return Plan(
        rows, schedule.queries, schedule.points, (m, columns if joint else n), schedule.peak,
        f.response.limits.bytes, float(m * max(1, value.size) * columns * value.dtype.itemsize),
        "groups" if joint else "training points",
    )  # fmt: skip
