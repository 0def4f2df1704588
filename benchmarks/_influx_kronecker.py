"""influx's half of `benchmarks.kronecker`, in a process of its own.

    python -m benchmarks._influx_kronecker IN.npz OUT.npz --task mlp --tolerance 0.05

IN and OUT are those of `benchmarks._kronfluence`. A round fits, scores all pairs and asks for
self-influence; every round after the first has its rows in a new order: nothing can be looked up.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import influx as ix
from benchmarks._measure import peak_bytes, shuffles
from benchmarks._tasks import TASKS

CURVATURES = {"kfac": ix.KFAC, "ekfac": ix.EKFAC}


def model_of(task: str, given):
    """The task's model with the weights of the file."""
    shapes = eqx.filter_eval_shape(TASKS[task].model, jr.key(0))
    floating = lambda x: (
        isinstance(x, jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.inexact)
    )
    params, static = eqx.partition(shapes, floating)
    leaves, structure = jtu.tree_flatten(params)
    read = [jnp.asarray(given[f"weight{i}"], float) for i in range(len(leaves))]
    return eqx.combine(jtu.tree_unflatten(structure, read), static)


def tracked(model):
    """The layers that kronfluence tracks."""
    is_layer = lambda x: isinstance(x, eqx.nn.Linear | eqx.nn.Conv2d)
    return [x for x in jtu.tree_leaves(model, is_leaf=is_layer) if is_layer(x)]


def one_round(curvature, risk, model, queries, self_influence: bool) -> tuple[dict, dict]:
    """What it found and the seconds it took."""
    ready = lambda tree: jax.block_until_ready(eqx.filter(tree, eqx.is_array))
    found, seconds = {}, {}
    start = time.perf_counter()
    f = ix.influence(risk, model, curvature)
    ready(f)
    seconds["fit"] = time.perf_counter() - start
    start = time.perf_counter()
    found["scores"] = np.asarray(f(queries))
    seconds["pairs"] = time.perf_counter() - start
    if self_influence:
        start = time.perf_counter()
        found["self"] = np.asarray(ix.self_influence(f))
        seconds["self"] = time.perf_counter() - start
    return found, seconds


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--task", required=True)
    parser.add_argument("--started", type=float, default=time.time())
    parser.add_argument("--strategy", choices=tuple(CURVATURES), default="ekfac")
    parser.add_argument("--fisher", choices=("exact", "sampled", "empirical"), default="exact")
    parser.add_argument("--damping", default="auto")
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--l2", type=float)
    parser.add_argument("--tracked", action="store_true", help="only layers kronfluence tracks")
    parser.add_argument("--double", action="store_true", help="in float64")
    parser.add_argument("--no-self", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    jax.config.update("jax_enable_x64", options.double)
    given = np.load(options.input)
    model = model_of(options.task, given)
    curvature = CURVATURES[options.strategy](
        options.fisher,
        damping="auto" if options.damping == "auto" else float(options.damping),
        tolerance=options.tolerance,
        key=jr.key(0) if options.fisher == "sampled" else None,
    )
    l2 = TASKS[options.task].l2 if options.l2 is None else options.l2
    for k in range(options.rounds):
        order, query_order = shuffles(k, len(given["y"]), len(given["yq"]))
        rows = lambda X, y, order: (jnp.asarray(X[order], float), jnp.asarray(y[order]))
        train = rows(given["X"], given["y"], order)
        queries = rows(given["Xq"], given["yq"], query_order)
        risk, part = ix.EmpiricalRisk(train, TASKS[options.task].loss, l2=l2), model
        if options.tracked:
            risk, part = ix.restrict(risk, model, tracked)
        answers, seconds = one_round(curvature, risk, part, queries, not options.no_self)
        if k == 0:
            found, process = answers, time.time() - options.started
    times = {f"time_{name}": value for name, value in (seconds | {"process": process}).items()}
    np.savez(options.output, peak=peak_bytes(), **found, **times)


if __name__ == "__main__":
    main()
