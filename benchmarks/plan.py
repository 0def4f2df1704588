"""What `plan` predicts against what is measured, and its choices around the crossovers.

    python -m benchmarks.plan            # the MLP of benchmarks.kronecker, 1,000 queries x 4,000 points

Prints seconds against predicted work, compiled temporaries against the estimate, forward mode against
its alternative for 1 to 256 queries, and a query by forward mode in passes forward.
"""

import time
from dataclasses import replace

import equinox as eqx
import jax
import jax.random as jr

import influx as ix
from benchmarks._tasks import TASKS
from influx._chunks import map_blocks, take
from influx._cost import BALANCE
from influx._engine import ForwardMode, choose
from influx._influence import _scores, prepared_queries, scheduled

QUERIES = 1000


def seconds(fn, *inputs) -> float:
    """The best of three runs after one that compiles, each on inputs of its own."""
    times = []
    for one in inputs:
        start = time.perf_counter()
        jax.block_until_ready(fn(one))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def fresh(queries, count: int):
    """The same queries in four orders."""
    rows = lambda k: jr.permutation(jr.key(k), QUERIES)[:count]
    return [take(queries, rows(k)) for k in range(4)]


def compiled_bytes(f, queries) -> int:
    arrays, static = eqx.partition(f, eqx.is_array)
    run = jax.jit(lambda arrays, q: _scores(eqx.combine(arrays, static), q))
    memory = run.lower(arrays, queries).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def whole(name: str, f, queries) -> None:
    """All pairs: predicted against measured."""
    plan = ix.plan(f, queries)
    took = seconds(f, *fresh(queries, QUERIES))
    work = plan.flops + BALANCE * plan.bytes
    print(f"\n{name}\n{plan}")
    print(
        f"{took:.2f} s, {plan.flops / took / 1e9:.0f} Gflop/s ({work / took / 1e9:.0f} with bytes); "
        f"temporaries {compiled_bytes(f, queries) / 1e6:.0f} MB, "
        f"predicted {plan.peak_bytes / 1e6:.0f} MB",
        flush=True,
    )


def forced(f, queries, forward: bool):
    """f with forward mode chosen, or refused."""
    response = f.response
    query = take(queries, 0)
    ways = response.scoring.alternatives(response, f.measurement, query)
    one = ways[-1] if forward else ways[0]
    m, n = len(queries[1]), f.risk.n
    schedule = choose((one,), response.limits, m, n, n, f.risk.weights.dtype)
    ready = replace(f, response=eqx.tree_at(lambda r: r.scoring, response, schedule.scorer))

    @eqx.filter_jit
    def run(g, queries):
        one = lambda prepared: g.effect.columns(g, prepared, None)
        block = lambda i: jax.vmap(one)(prepared_queries(g, schedule, take(queries, i)))
        return map_blocks(block, m, schedule.queries)

    return lambda q: run(ready, q), schedule.work


def crossover(name: str, f, queries) -> None:
    print(f"\n{name}: forward mode against its alternative, in ms (and predicted ratio)")
    for count in (1, 4, 16, 64, 256):
        inputs = fresh(queries, count)
        (forward, a), (other, b) = (forced(f, inputs[0], choice) for choice in (True, False))
        times = [1e3 * seconds(run, *inputs) for run in (forward, other)]
        _, schedule = scheduled(f, inputs[0])
        taken = "forward" if any(r.way == "forward mode" for r in schedule.rows) else "other"
        ratio = times[0] / times[1]
        print(
            f"{count:4} queries: {times[0]:8.1f} {times[1]:8.1f}  ratio {ratio:5.2f}, predicted "
            f"{a / b:5.2f}; taken: {taken}",
            flush=True,
        )


def forward_passes(f, queries) -> None:
    """One query's `columns` by forward mode over one forward pass of all training losses."""
    scoring = ForwardMode(points=512)
    response = f.response
    prepared = [scoring.prepare(response, f.measurement, take(queries, i)) for i in range(4)]
    columns = eqx.filter_jit(lambda p: scoring.columns(response, p, None))
    took = seconds(columns, *prepared)
    noisy = [
        jax.tree_util.tree_map(
            lambda x, i=i: x * (1 + 1e-6 * i) if eqx.is_inexact_array(x) else x, f.model
        )
        for i in range(4)
    ]
    losses = eqx.filter_jit(lambda model: response.risk.losses(model))
    once = seconds(losses, *noisy)
    print(
        f"\none query by forward mode {1e3 * took:.1f} ms, all training losses {1e3 * once:.1f} ms: "
        f"{took / once:.1f} forward passes"
    )


def main() -> None:
    task = TASKS["mlp"]
    queries = take(task.data()[1], slice(0, QUERIES))
    risk = task.risk()
    model = task.fitted(risk, 0)
    fast, exact = (ix.influence(risk, model, ix.EKFAC(tolerance=t)) for t in (0.05, 0.0))
    rows = ix.influence(risk, model, ix.Identity())
    whole("EKFAC(tolerance=0.05)", fast, queries)
    whole("EKFAC()", exact, queries)
    whole("Identity()", rows, queries)
    crossover("EKFAC(tolerance=0.05)", fast, queries)
    crossover("EKFAC()", exact, queries)
    crossover("Identity()", rows, queries)
    forward_passes(rows, queries)


if __name__ == "__main__":
    main()
