"""Bad input is refused by name: what was wrong, what to write instead, and before any work is done.

Each row is (what is called, the cause that the message names, the remedy that it gives). The model of
every problem counts its own executions, and a refusal may not cost one: shapes are traced, not run.
"""

import functools
import re
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import influx as ix
from tests.helpers import linear_model

N, D, C = 12, 4, 3
_runs = {"count": 0}


def _count():
    _runs["count"] += 1


def predict(model, x):
    """The model called on one input, counting executions (tracing it does not count)."""
    jax.debug.callback(_count)
    return model(x)


def executions() -> int:
    jax.effects_barrier()
    return _runs["count"]


_rng = np.random.default_rng(0)
X, y = _rng.normal(size=(N, D)), _rng.integers(0, C, N)
Y = _rng.normal(size=(N, C))
Xq, yq = _rng.normal(size=(5, D)), _rng.integers(0, C, 5)
MASKS = _rng.integers(0, 2, (6, N)).astype(float)


def put(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


def risk(data=(X, y), loss=None, l2=0.1, **kwargs):
    loss = ix.SoftmaxCrossEntropy() if loss is None else loss
    return ix.EmpiricalRisk(data, loss, l2=l2, **{"predict": predict, **kwargs})


def meet(data=(X, y), loss=None, model=None, **kwargs):
    """A risk, and the model that it meets in `influence`."""
    return ix.influence(risk(data, loss, **kwargs), linear_model() if model is None else model)


def scalar_model():
    return linear_model(outputs="scalar")


def network():
    return eqx.nn.MLP(D, C, 4, 1, activation=jnp.tanh, key=jr.key(0))


@functools.cache
def world() -> SimpleNamespace:
    """What the verbs are called on, built (and run) once, before executions are counted."""
    model = ix.fit(risk(), linear_model(), ix.Newton())
    f = ix.influence(risk(), model)
    squares = risk((X, Y), ix.SquaredError())
    custom = risk((X, Y), ix.CustomLoss(lambda o, t: 0.5 * jnp.sum((o - t) ** 2)))
    scalar = ix.CustomLoss(lambda o, t: jnp.sum(o**2), logits=lambda o: jnp.sum(o))
    penalty = jtu.tree_map(lambda p: 0.1 * (p.ndim > 1), eqx.filter(model, eqx.is_inexact_array))
    single = jtu.tree_map(lambda p: p.astype(jnp.float32), model)
    return SimpleNamespace(
        model=model,
        f=f,
        relative=ix.relative(f, "self"),
        groups=ix.groups(f, MASKS),
        first=ix.removal(f, "first-order"),
        newton=ix.removal(f, "newton"),
        absent=ix.influence(risk(weights=put(np.ones(N), 0, 0.0)), model),
        diagonal=ix.influence(risk(), model, ix.Diagonal()),
        squares=ix.influence(squares, model),
        custom=ix.influence(custom, model),
        scalar_logits=ix.influence(risk(loss=scalar), model),
        network=ix.influence(risk(), network(), ix.GaussNewton()),
        unpenalised=ix.influence(risk(l2=0.0), model, ix.CG(ix.GaussNewton())),
        part_penalised=ix.influence(risk(l2=penalty), model, ix.GaussNewton(damping=0.1)),
        single=ix.influence(risk((X.astype(np.float32), y)), single),
    )


def refused(trigger, cause: str, remedy: str) -> None:
    """`trigger` raises a `ValueError` that names cause and remedy, and runs no model."""
    before = executions()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is searched twice)
        trigger()
    message = str(caught.value)
    assert re.search(cause, message), message
    assert re.search(remedy, message), message
    assert executions() == before, "refused only after work was done"


# --- The data alone ------------------------------------------------------------------------------

LAST_NAN = put(X, (3, 1), np.nan)
DATA = {
    "NaN": (lambda: risk((LAST_NAN, y)), r"`data`\[0\] is NaN.* index 3", r"Impute or drop"),
    "infinity": (
        lambda: risk(({"a": X, "b": put(Y, (7, 0), np.inf)}, y)),
        r"`data`\[0\]\['b'\] is NaN or infinite at 1 .*index 7",
        "isfinite",
    ),
    "lengths": (
        lambda: risk((X, y[:-1])),
        r"leading axes of `data` differ.*12.*11",
        "one row per example",
    ),
    "empty": (lambda: risk((X[:0], y[:0])), "`data` is empty", "at least one"),
    "no arrays": (lambda: risk(((), ())), "`data` holds no arrays", "leading axis"),
    "no pair": (lambda: risk(X), "must be a pair .*ndarray", "such as zeros"),
    "three parts": (lambda: risk((X, y, y)), "tuple of 3", "tuple or dict of their own"),
    "mapping": (lambda: risk({"x": X, "y": y}), "dict of 2", "pair"),
    "strings": (lambda: risk((X, np.array(["a"] * N))), r"`data`\[1\].*<U1", "return_inverse"),
    "list": (lambda: risk((X.tolist(), y)), r"`data`\[0\]\[0\]\[0\].*got float", "np.asarray"),
    "objects": (lambda: risk((X.astype(object), y)), "dtype object", "Encode it as numbers"),
    "dates": (lambda: risk((X, np.full(N, "2020", "M8[D]"))), "datetime64", "Encode it as numbers"),
    "complex": (lambda: risk((X + 0j, y)), r"`data`\[0\] is complex128", "x.real, x.imag"),
    "no axis": (lambda: risk((X[0], np.int64(1))), "no leading axis", r"x\[None\]"),
    "loss class": (
        lambda: risk(loss=ix.SquaredError),
        "must be an influx loss",
        r"CustomLoss\(fn\)",
    ),
    "loss function": (lambda: risk(loss=lambda o, t: 0.0), "must be an influx loss", "CustomLoss"),
    "predict": (lambda: risk(predict=3), "`predict` must be a function.*got 3", "lambda model, x"),
    "weights short": (
        lambda: risk(weights=np.ones(N - 1)),
        r"shape \(12,\).*\(11,\)",
        r"np.ones\(12",
    ),
    "weights scalar": (lambda: risk(weights=2.0), r"shape \(12,\).*\(\)", "one per example"),
    "weights negative": (
        lambda: risk(weights=put(np.ones(N), 3, -1)),
        r"at least 0, got -1.0 at index 3",
        "Weight 0 removes",
    ),
    "weights NaN": (
        lambda: risk(weights=put(np.ones(N), 2, np.nan)),
        "finite.*nan at index 2",
        "Weight 0 removes",
    ),
    "weights zero": (lambda: risk(weights=np.zeros(N)), "All `weights` are 0", "positive weight"),
    "weights string": (lambda: risk(weights="balanced"), "real numbers, got <U8", "1 keeps it"),
    "weights complex": (lambda: risk(weights=np.ones(N) * 1j), "complex128", "1 keeps it"),
    "other weights": (lambda: world().f.risk.with_weights(-np.ones(N)), "at least 0", "removes"),
    "l2 negative": (lambda: risk(l2=-0.1), "at least 0, got -0.1", "Use 0. for no penalty"),
    "l2 leaf negative": (lambda: risk(l2={"w": -1.0}), r"`l2`\['w'\].*at least 0", "Use 0."),
    "l2 NaN": (lambda: risk(l2=np.nan), "finite.*got nan", "Use 0."),
    "l2 string": (lambda: risk(l2="a"), "real number, got 'a'", "For instance"),
    "l2 boolean": (lambda: risk(l2=True), "real number, got True", "For instance"),
    "l2 complex": (lambda: risk(l2=1j), "real number, got 1j", "For instance"),
    "l2 None": (lambda: risk(l2=None), "got None", "Use 0. for none"),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data_are_refused(name):
    world()
    refused(*DATA[name])


# --- Data, model and loss together ---------------------------------------------------------------

double, half = linear_model(), jtu.tree_map(lambda p: p.astype(jnp.float32), linear_model())
MEETINGS = {
    "parameter NaN": (
        lambda: meet(model=eqx.tree_at(lambda m: m.bias, double, jnp.full(C, jnp.nan))),
        r"parameter \.bias is NaN or infinite",
        "Retrain with a smaller step",
    ),
    "parameter infinite": (
        lambda: meet(
            model=eqx.tree_at(lambda m: m.weight, double, double.weight.at[0, 1].set(jnp.inf))
        ),
        r"parameter \.weight is NaN or infinite",
        "earlier model",
    ),
    "parameters mixed": (
        lambda: meet(model=eqx.tree_at(lambda m: m.bias, double, half.bias)),
        r"several dtypes.*\.weight.*float64.*\.bias.*float32",
        "Convert them to one",
    ),
    "parameters complex": (
        lambda: meet(model=jtu.tree_map(lambda p: p.astype(complex), double)),
        r"\.weight is complex128",
        "two real arrays",
    ),
    "no parameters": (lambda: meet(model=lambda x: x[:C]), "no parameters", "pytree of arrays"),
    "order": (
        lambda: ix.influence(linear_model(), risk()),
        "EmpiricalRisk, got Linear",
        r"\(risk, model\)",
    ),
    "data dtype": (
        lambda: meet((X.astype(np.float32), y)),
        r"float64 but the data leaf \[0\] is float32",
        r"astype\(jnp\.float64\)",
    ),
    "target dtype": (
        lambda: meet((X, Y.astype(np.float32)), ix.SquaredError()),
        r"data leaf \[1\] is float32",
        r"astype\(jnp\.float64\)",
    ),
    "parameter dtype": (
        lambda: meet(model=half),
        r"float32 but .*float64",
        r"astype\(jnp\.float32\)",
    ),
    "one class": (
        lambda: meet((X, np.zeros(N, int)), model=eqx.nn.Linear(D, 1, key=jr.key(0))),
        "at least two classes, got outputs of shape .1,",
        "BinaryCrossEntropy",
    ),
    "input width": (
        lambda: meet((X[:, :2], y)),
        r"cannot be called on the input float64\[2\]",
        "one example, without the leading axis",
    ),
    "predict arguments": (
        lambda: meet(predict=lambda model: model),
        "cannot be called",
        r"predict\(model, x\)",
    ),
    "output tuple": (
        lambda: meet(predict=lambda m, x: (m(x), x)),
        "one floating array as the model's output",
        "Pick it with `predict=",
    ),
    "output integer": (
        lambda: meet(predict=lambda m, x: jnp.argmax(m(x), keepdims=True)),
        "one floating array.*int64",
        "CustomLoss",
    ),
    "output scalar": (
        lambda: meet(model=scalar_model()),
        r"logits \[\.\.\., C\], got a scalar",
        "BinaryCrossEntropy",
    ),
    "label high": (
        lambda: meet((X, put(y, [4, 6], 3))),
        r"out of range at examples \[4, 6\] \(2 in all\) .*\[3\].*0 to 2",
        "return_inverse",
    ),
    "label negative": (lambda: meet((X, put(y, 1, -1))), r"examples \[1\].*\[-1\]", "Renumber"),
    "labels float": (
        lambda: meet((X, y.astype(float))),
        "integer labels, got dtype float64",
        r"y\.astype\(int\)",
    ),
    "labels boolean": (lambda: meet((X, y == 1)), "got dtype bool", r"y\.astype\(int\)"),
    "labels one-hot": (lambda: meet((X, np.eye(C, dtype=int)[y])), r"\(12, 3\)", r"y\.argmax"),
    "labels column": (
        lambda: meet((X, y[:, None])),
        r"expected shape \[n\].*\(12, 1\)",
        r"y\[:, 0\]",
    ),
    "labels in parts": (lambda: meet((X, (y, y))), "pytree of 2 arrays", "CustomLoss"),
    "no labels": (lambda: meet((X, None)), "pytree of 0 arrays", "CustomLoss"),
    "binary labels": (
        lambda: meet((X, 2 * (y > 0) - 1), ix.BinaryCrossEntropy(), scalar_model()),
        "labels 0 and 1, got others at examples",
        r"\(y > 0\)",
    ),
    "binary column": (
        lambda: meet((X, (y > 0)[:, None]), ix.BinaryCrossEntropy(), scalar_model()),
        r"expected shape \[n\].*\(12, 1\)",
        r"y\[:, 0\]",
    ),
    "binary output": (
        lambda: meet((X, y > 0), ix.BinaryCrossEntropy(), predict=lambda m, x: (m(x),)),
        "BinaryCrossEntropy takes one floating array",
        "CustomLoss",
    ),
    "squared shape": (
        lambda: meet((X, Y[:, 0]), ix.SquaredError()),
        r"expected shape \[n, 3\].*\(12,\)",
        r"y\[:, None\]",
    ),
    "class weights": (
        lambda: meet(loss=ix.SoftmaxCrossEntropy(class_weights=np.ones(4))),
        r"`class_weights` needs shape \(3,\).*\(4,\)",
        "one factor per class",
    ),
    "loss vector": (
        lambda: meet((X, Y), ix.CustomLoss(lambda o, t: (o - t) ** 2)),
        r"must be a scalar.*\(3,\)",
        "Sum or average",
    ),
    "loss tuple": (lambda: meet(loss=ix.CustomLoss(lambda o, t: (o, t))), "scalar, got", "Sum"),
    "loss constant": (lambda: meet(loss=ix.CustomLoss(lambda o, t: 1.0)), "scalar, got 1.0", "Sum"),
    "loss integer": (
        lambda: meet(loss=ix.CustomLoss(lambda o, t: jnp.argmax(o) - t)),
        "real floating number, got int64",
        "differentiable one",
    ),
    "loss dtype": (
        lambda: meet(loss=ix.CustomLoss(lambda o, t: jnp.sum(o).astype(jnp.float32))),
        "loss is float32 where the parameters are float64",
        "Compute it in float64",
    ),
    "loss arguments": (
        lambda: meet(loss=ix.CustomLoss(lambda o: o)),
        r"loss cannot be called .*int64\[\]",
        r"loss\(output, target\)",
    ),
    "l2 structure": (
        lambda: meet(l2=[0.1, 0.2]),
        "prefix of the model's parameters",
        r"For instance `jtu\.tree_map",
    ),
    "l2 of another model": (
        lambda: meet(l2=jtu.tree_map(lambda _: 0.1, eqx.filter(network(), eqx.is_inexact_array))),
        "prefix of the model's parameters",
        "For instance",
    ),
    "l2 shape": (
        lambda: meet(l2=np.full(2, 0.1)),
        r"\.weight has shape \(2,\)",
        "one number for the leaf",
    ),
    "l2 missing": (
        lambda: meet(l2=eqx.tree_at(lambda m: m.bias, jtu.tree_map(lambda _: 0.1, double), None)),
        r"`l2` of the parameter \.bias is None",
        r"0\. for no penalty",
    ),
    "state": (
        lambda: meet(
            model=eqx.nn.Sequential([linear_model(), eqx.nn.BatchNorm(C, "b", mode="batch")])
        ),
        r"layers\[1\] keeps state",
        "GroupNorm or LayerNorm",
    ),
    "dropout": (
        lambda: meet(model=eqx.nn.Sequential([linear_model(), eqx.nn.Dropout(0.5)])),
        r"Dropout at \.layers\[1\] is in training mode",
        "inference_mode",
    ),
    "curvature class": (
        lambda: ix.influence(risk(), linear_model(), ix.Hessian),
        "must be a curvature",
        r"Hessian\(\), not Hessian",
    ),
    "curvature name": (
        lambda: ix.influence(risk(), linear_model(), "hessian"),
        "must be a curvature such as .*got 'hessian'",
        r"influx\.Hessian\(\)",
    ),
    "chunk": (
        lambda: ix.influence(risk(), linear_model(), chunk_size=0),
        "at least 1, got 0",
        "None chooses",
    ),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_data_model_and_loss_that_do_not_fit_are_refused(name):
    world()
    refused(*MEETINGS[name])


MISFITS = {
    "label": (lambda: (risk((X, put(y, 4, 3))), linear_model()), r"examples \[4\]", "Renumber"),
    "loss": (
        lambda: (risk((X, Y), ix.CustomLoss(lambda o, t: o - t)), linear_model()),
        "must be a scalar",
        "Sum or average",
    ),
    "parameter": (
        lambda: (risk(), jtu.tree_map(lambda p: p * jnp.nan, linear_model())),
        "parameter .weight is NaN",
        "earlier model",
    ),
    "dtype": (lambda: (risk(), half), "float32 but the data leaf", "astype"),
}
TAKES_RISK = {
    "fit": lambda r, m: ix.fit(r, m, ix.Newton()),
    "leave_one_out": lambda r, m: ix.leave_one_out(r, m, ix.Newton()),
    "leave_subset_out": lambda r, m: ix.leave_subset_out(r, m, ix.Newton(), masks=MASKS),
    "subsampled_memorization": lambda r, m: ix.subsampled_memorization(
        r, m, ix.Newton(), key=jr.key(0), outcome=lambda model, z: jnp.sum(model(z[0]))
    ),
    "pbrf": lambda r, m: ix.pbrf(r, m),
    "restrict": lambda r, m: ix.restrict(r, m, lambda part: part.weight),
    "check": lambda r, m: ix.testing.check(r, m),
}


@pytest.mark.parametrize("verb", TAKES_RISK)
def test_every_verb_that_takes_a_risk_and_a_model_checks_them(verb):
    for build, cause, remedy in MISFITS.values():
        refused(lambda build=build: TAKES_RISK[verb](*build()), cause, remedy)


# --- Settings ------------------------------------------------------------------------------------

SETTINGS = {
    "damping negative": (lambda: ix.Hessian(damping=-1.0), "at least 0, got -1.0", "damping=0."),
    "damping NaN": (lambda: ix.GaussNewton(damping=np.nan), "at least 0, got nan", "1e-3"),
    "around a mixture": (
        lambda: ix.CG(ix.Mixture({lambda m: m.bias: ix.GaussNewton()}, ix.GaussNewton())),
        "no damping before it meets the data",
        "put what solves inside it",
    ),
    "damping string": (lambda: ix.Identity(damping="auto"), "real number, got 'auto'", "`damping`"),
    "damping complex": (lambda: ix.Hessian(damping=1 + 1j), r"got \(1\+1j\)", "one real number"),
    "no class weight": (
        lambda: ix.SoftmaxCrossEntropy(class_weights=[0.0, 0.0]),
        r"not all 0, got \[0.0, 0.0\]",
        "bincount",
    ),
    "curvature in CG": (lambda: ix.CG("a"), "a curvature such as.*got 'a'", "Mind the parentheses"),
    "curvature in blocks": (
        lambda: ix.BlockDiagonal(ix.Hessian),
        "got <class",
        r"Hessian\(\), not",
    ),
    "curvature in a diagonal": (lambda: ix.Diagonal(3), "got 3", r"Hessian\(\), not"),
    "Fisher key number": (lambda: ix.Fisher("sampled", key=0), "got 0", r"jax\.random\.key\(0\)"),
    "rtol a string": (lambda: ix.CG(ix.Hessian(), rtol="a"), "`rtol`.*got 'a'", "None chooses"),
    "solver steps": (
        lambda: ix.MINRES(ix.Hessian(), max_steps=0.5),
        "`max_steps`.*got 0.5",
        "None chooses",
    ),
    "tolerance a flag": (lambda: ix.LBFGS(tolerance=True), "got True", "must be positive"),
    "tolerance a string": (lambda: ix.Newton("1e-3"), "got '1e-3'", "must be positive"),
    "Fisher draws": (
        lambda: ix.Fisher("sampled", key=jr.key(0), draws=1.5),
        "`draws`.*got 1.5",
        "`draws` must be a whole number",
    ),
    "rtol": (
        lambda: ix.influence(risk(), linear_model(), ix.CG(ix.Hessian(), rtol=np.nan)),
        "`rtol`.*got nan",
        "such as 1e-10",
    ),
    "chunk size": (
        lambda: ix.influence(risk(), linear_model(), chunk_size=2.5),
        "`chunk_size`.*got 2.5",
        "None chooses one",
    ),
    "trainer class": (
        lambda: ix.fit(risk(), linear_model(), ix.Newton),
        "got <class",
        r"Newton\(\)",
    ),
    "optax in fit": (
        lambda: ix.fit(risk(), linear_model(), optax.sgd(0.1)),
        "must be a trainer",
        r"influx\.SGD",
    ),
    "Fisher kind": (lambda: ix.Fisher("true"), "got 'true'", '"exact", "sampled" or "empirical"'),
    "Fisher key": (lambda: ix.Fisher("sampled"), "draws labels", r"key=jax\.random\.key\(0\)"),
    "smoothing": (
        lambda: ix.SoftmaxCrossEntropy(label_smoothing=1.0),
        r"\[0, 1\), got 1.0",
        "0 is",
    ),
    "smoothing string": (lambda: ix.SoftmaxCrossEntropy(label_smoothing="a"), "got 'a'", "0 is"),
    "reduction": (
        lambda: ix.SoftmaxCrossEntropy(reduction="none"),
        "got 'none'",
        '"sum" or "mean"',
    ),
    "class weight": (
        lambda: ix.SoftmaxCrossEntropy(class_weights=[1.0, -1.0]),
        r"`class_weights` must be finite numbers ≥ 0.*-1",
        "bincount",
    ),
    "class weights balanced": (
        lambda: ix.SoftmaxCrossEntropy(class_weights="balanced"),
        "got 'balanced'",
        "bincount",
    ),
    "class weights complex": (
        lambda: ix.SoftmaxCrossEntropy(class_weights=np.ones(3) * 1j),
        "must be finite numbers",
        "bincount",
    ),
    "custom loss": (lambda: ix.CustomLoss(3), "`fn` of a CustomLoss.*got 3", "(output, target)"),
    "custom sample": (
        lambda: ix.CustomLoss(lambda o, t: 0.0, sample=3),
        "`sample` of a CustomLoss.*got 3",
        "(key, output)",
    ),
    "reference float": (
        lambda: ix.Reference(1.5),
        "index of a training point.*1.5",
        "For instance",
    ),
    "reference empty": (lambda: ix.Reference([]), r"got \[\]", r"Reference\(\[3, 7\]\)"),
    "tolerance": (lambda: ix.Newton(tolerance=0.0), "`tolerance`.*got 0.0", "must be positive"),
    "steps": (lambda: ix.LBFGS(max_steps=0), "got 0", "whole number, at least 1"),
    "batch size": (
        lambda: ix.fit(
            risk(), linear_model(), ix.SGD(optax.sgd(0.1), batch_size=13, epochs=1, key=jr.key(0))
        ),
        "13 but there are 12",
        "Use batch_size=12",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_refused_where_they_are_written(name):
    world()
    refused(*SETTINGS[name])


# --- Queries: every verb that takes them, on every way of getting them wrong ----------------------

QUERIES = {
    "width": (
        (Xq[:, :2], yq),
        r"rows of shapes \[\(4,\), \(\)\].*\[\(2,\), \(\)\]",
        "training point",
    ),
    "single": ((Xq[0], yq[0]), "has no leading axis", r"\(x\[None\], y\[None\]\)"),
    "single vector": ((Xq[0], yq[:4]), r"\[\(\), \(\)\]", r"add a leading axis: `\(x\[None\]"),
    "inputs alone": (Xq, "pair .inputs, targets., got a ndarray", "such as zeros"),
    "no targets": ((Xq, None), "must look like a training point", "rows of shapes"),
    "lengths": ((Xq, yq[:-1]), "leading axes of .* differ.*5.*4", "one row per example"),
    "empty": ((Xq[:0], yq[:0]), "is empty", "at least one"),
    "NaN": ((put(Xq, (1, 2), np.nan), yq), r"\[0\] is NaN or infinite at 1 .*index 1", "Impute"),
    "float32": (
        (Xq.astype(np.float32), yq),
        "are float32, the training data's are float64",
        "astype",
    ),
    "integers": (
        (np.ones((5, D), int), yq),
        "are int64, the training data's are float64",
        "astype",
    ),
    "booleans": ((Xq > 0, yq), "are bool, the training data's are float64", "astype"),
    "complex": ((Xq + 0j, yq), "complex128", "x.real, x.imag"),
    "strings": (
        (np.full((5, D), "a"), yq),
        r"\[0\] must be a numeric array, got dtype <U1",
        "Encode",
    ),
    "label range": ((Xq, put(yq, 2, 7)), r"out of range at examples \[2\]", "Renumber"),
    "label dtype": ((Xq, yq.astype(float)), "integer labels, got dtype float64", r"astype\(int\)"),
}
TAKES_QUERIES = {
    "call": lambda f, q: f(q),
    "relative": lambda f, q: world().relative(q),
    "removal": lambda f, q: world().newton(q),
    "groups": lambda f, q: world().groups(q),
    "classification": lambda f, q: ix.classification(f, "margin")(q),
    "value": ix.value,
    "top_k": lambda f, q: ix.top_k(f, q, 2),
    "restriction_bound": lambda f, q: ix.restriction_bound(f, lambda m: m.weight, q),
    "certify": ix.certify,
    "second-order groups": lambda f, q: ix.groups(f, MASKS, order=2)(q),
    "most_influential_subset": lambda f, q: ix.most_influential_subset(f, q, 2),
}


@pytest.mark.parametrize("verb", TAKES_QUERIES)
def test_queries_unlike_the_training_data_are_refused(verb):
    f = world().f
    for bad, cause, remedy in QUERIES.values():
        refused(lambda bad=bad: TAKES_QUERIES[verb](f, bad), cause, remedy)


# --- The verbs' own arguments, and every "no" of the combination table ----------------------------

matrix = lambda m, x: jnp.outer(m(x), m(x))
VERBS = {
    "classification kind": (
        lambda w: ix.classification(w.f, "logits"),
        "got 'logits'",
        r'"probability", "logit" or "margin".*influx\.measure',
    ),
    "class too high": (lambda w: ix.classification(w.f, class_=3), r"0…2.*got 3", "has 3 classes"),
    "class negative": (lambda w: ix.classification(w.f, class_=-1), "got -1", "0…2"),
    "class float": (
        lambda w: ix.classification(w.f, class_=1.0),
        "one class, got 1.0",
        "Leave it out",
    ),
    "class boolean": (lambda w: ix.classification(w.f, class_=True), "got True", "Leave it out"),
    "class and margin": (
        lambda w: ix.classification(w.f, "margin", class_=1),
        "the query's own label",
        "leave `class_` out",
    ),
    "classes of a regression": (
        lambda w: ix.classification(w.squares),
        "SquaredError is no classifier",
        r"influx\.measure",
    ),
    "classes of a custom loss": (
        lambda w: ix.classification(w.custom),
        "of a CustomLoss need",
        "logits=lambda output",
    ),
    "scalar class logits": (
        lambda w: ix.classification(w.scalar_logits),
        r"a vector \[C\], got",
        r"jnp\.stack",
    ),
    "memorization step": (
        lambda w: ix.memorization(w.f, "Newton"),
        "got 'Newton'",
        '"first-order" or "newton"',
    ),
    "memorization of a regression": (
        lambda w: ix.memorization(w.squares),
        "no classifier",
        "SoftmaxCrossEntropy or BinaryCrossEntropy",
    ),
    "measure function": (lambda w: ix.measure(w.f, 3), "got 3", r"function of \(model, query\)"),
    "measure matrix": (lambda w: ix.measure(w.f, matrix)(Xq), r"\(3, 3\)", "jnp.ravel"),
    "measure decision": (
        lambda w: ix.measure(w.f, lambda m, x: jnp.argmax(m(x)))(Xq),
        "int64: a decision has no derivative",
        "logit, a probability or a margin",
    ),
    "measure NaN": (
        lambda w: ix.measure(w.f, lambda m, x: m(x))(put(Xq, (0, 0), np.nan)),
        "`queries` is NaN or infinite",
        "Impute",
    ),
    "measure string": (
        lambda w: ix.measure(w.f, lambda m, x: m(x))("abc"),
        "`queries` must be a numeric array, got str",
        r"np\.asarray",
    ),
    "relative kind": (
        lambda w: ix.relative(w.f, "norm"),
        "got 'norm'",
        r'"loss", "parameters", "self", "cosine" or influx\.Reference',
    ),
    "reference index": (lambda w: ix.relative(w.f, 3), "got 3", r"influx\.Reference\(i\)"),
    "reference too high": (
        lambda w: ix.relative(w.f, ix.Reference([0, N])),
        r"got \[0, 12\]",
        "run from 0 to 11",
    ),
    "reference negative": (lambda w: ix.relative(w.f, ix.Reference(-1)), r"got \[-1\]", "0 to 11"),
    "removal kind": (
        lambda w: ix.removal(w.f, "Newton"),
        "got 'Newton'",
        '"first-order" or "newton"',
    ),
    "groups shape": (
        lambda w: ix.groups(w.f, np.ones((2, N + 1))),
        r"shape \[k, 12\].*\(2, 13\)",
        r"mask\[None\]",
    ),
    "groups vector": (lambda w: ix.groups(w.f, np.ones(N)), r"got \(12,\)", r"mask\[None\]"),
    "groups empty": (lambda w: ix.groups(w.f, np.ones((0, N))), r"got \(0, 12\)", r"\[k, 12\]"),
    "groups NaN": (lambda w: ix.groups(w.f, put(MASKS, (0, 3), np.nan)), "NaN", "1 is a member"),
    "measure nothing": (
        lambda w: ix.measure(w.f, lambda m, x: jnp.zeros(0))(Xq),
        "empty vector",
        "nothing is measured",
    ),
    "groups negative": (lambda w: ix.groups(w.f, -MASKS), "negative", "1 is a member"),
    "groups members": (
        lambda w: ix.groups(w.f, [[0, 1], [2]]),
        "rows of different lengths",
        r"np\.isin\(np\.arange\(n\), members\)",
    ),
    "groups string": (lambda w: ix.groups(w.f, "a"), "real numbers, got <U1", r"np\.isin"),
    "groups complex": (lambda w: ix.groups(w.f, 1j * MASKS), "complex128", r"np\.isin"),
    "groups order 3": (
        lambda w: ix.groups(w.f, MASKS, order=3),
        "`order` must be.*in 1…2, got 3",
        "leave_subset_out",
    ),
    "groups order boolean": (lambda w: ix.groups(w.f, MASKS, order=True), "got True", "in 1…2"),
    "groups order string": (
        lambda w: ix.groups(w.f, MASKS, order="second"),
        "got 'second'",
        "in 1…2",
    ),
    "subset of none": (
        lambda w: ix.most_influential_subset(w.f, (Xq, yq), 0),
        "1…12.*got 0",
        "training points",
    ),
    "subset of too many": (
        lambda w: ix.most_influential_subset(w.f, (Xq, yq), N + 1),
        "1…12.*got 13",
        "training points",
    ),
    "subset of a fraction": (
        lambda w: ix.most_influential_subset(w.f, (Xq, yq), 0.1),
        "whole number.*got 0.1",
        "training points",
    ),
    "subset candidates": (
        lambda w: ix.most_influential_subset(w.f, (Xq, yq), 2, candidates=0),
        "at least 1, got 0",
        "12 try all points",
    ),
    "subset extreme": (
        lambda w: ix.most_influential_subset(w.f, (Xq, yq), 2, "lower"),
        "got 'lower'",
        '"highest" or "lowest"',
    ),
    "k zero": (lambda w: ix.top_k(w.f, (Xq, yq), 0), "1…12.*got 0", "sorts all"),
    "k above n": (lambda w: ix.top_k(w.f, (Xq, yq), N + 1), "1…12.*got 13", "k=12 sorts all"),
    "k float": (lambda w: ix.top_k(w.f, (Xq, yq), 2.0), "whole number.*got 2.0", "sorts all"),
    "k boolean": (lambda w: ix.top_k(w.f, (Xq, yq), True), "got True", "sorts all"),
    "top_k chunk": (
        lambda w: ix.top_k(w.f, (Xq, yq), 2, chunk_size=0),
        "at least 1, got 0",
        "None chooses",
    ),
    "value of one": (
        lambda w: ix.value(w.f, (Xq[:1], yq[:1])),
        "at least 2 examples.*got 1",
        r"sign of `f\(queries\)`",
    ),
    "step of a value": (
        lambda w: ix.value(w.f, (Xq, yq), "second-order"),
        "`step`.*got 'second-order'",
        '"first-order" or "newton"',
    ),
    "refine of a derivative": (
        lambda w: ix.value(w.f, (Xq, yq), refine=1),
        'refine=1 at step="first-order"',
        'step="newton"',
    ),
    "refine of memorization": (
        lambda w: ix.memorization(w.f, "first-order", refine=np.int64(2)),
        'refine=2 at step="first-order"',
        'step="newton"',
    ),
    "refine of a first order": (
        lambda w: ix.removal(w.f, refine=1),
        'refine=1 at kind="first-order"',
        'kind="newton"',
    ),
    "refine negative": (
        lambda w: ix.value(w.f, (Xq, yq), "newton", refine=-1),
        "`refine`.*got -1",
        "chord steps",
    ),
    "value of no removal": (
        lambda w: ix.value(w.absent, (Xq, yq), "newton"),
        "11 such points, and asked about 1 of weight 0",
        'step="first-order"',
    ),
    "value without a Newton step": (
        lambda w: ix.value(w.diagonal, (Xq, yq), "newton"),
        "what one point adds",
        "first-order",
    ),
    "bound steps": (
        lambda w: ix.restriction_bound(w.f, lambda m: m.bias, (Xq, yq), steps=0),
        "`steps`.*got 0",
        "at least 1",
    ),
    "bound without l2": (
        lambda w: ix.restriction_bound(w.unpenalised, lambda m: m.bias, (Xq, yq)),
        "of CG here is 0.0",
        "l2 > 0 on every parameter or a positive damping",
    ),
    "where of a bound": (
        lambda w: ix.restriction_bound(w.f, lambda m: (), (Xq, yq)),
        "selects nothing",
        r"lambda m: m\.layers\[-1\]",
    ),
    "where nothing": (
        lambda w: ix.restrict(w.f.risk, w.model, lambda m: ()),
        "selects nothing that holds parameters",
        r"m\.layers\[-1\]\.weight",
    ),
    "where a function": (
        lambda w: ix.restrict(w.network.risk, w.network.model, lambda m: m.activation),
        "selects nothing that holds parameters",
        r"Select a layer or an array",
    ),
    "where no attribute": (
        lambda w: ix.restrict(w.f.risk, w.model, lambda m: m.layers),
        "no attribute 'layers'",
        "must select a part of the model",
    ),
    "where out of range": (
        lambda w: ix.restrict(w.network.risk, w.network.model, lambda m: m.layers[7]),
        "index out of range",
        r"as in `lambda m: m\.layers",
    ),
    "where computed": (
        lambda w: ix.restrict(w.f.risk, w.model, lambda m: 2 * m.weight),
        "not compute others",
        "must select a part of the model",
    ),
    "where a layer": (
        lambda w: ix.restrict(w.f.risk, w.model, w.model),
        "must be a function.*got a Linear",
        r"lambda m: m\.layers\[-1\]",
    ),
    "where a string": (
        lambda w: ix.restrict(w.f.risk, w.model, "weight"),
        "must be a function.*got a str",
        r"as in `lambda m:",
    ),
    "trainer class": (
        lambda w: ix.leave_one_out(w.f.risk, w.model, ix.Newton),
        "must be a trainer",
        r"Newton\(\), not Newton",
    ),
    "trainer of optax": (
        lambda w: ix.leave_subset_out(w.f.risk, w.model, optax.sgd(0.1), masks=MASKS),
        "must be a trainer",
        r"influx\.Newton\(\)",
    ),
    "index too high": (
        lambda w: ix.leave_one_out(w.f.risk, w.model, ix.Newton(), indices=[N]),
        r"got 12",
        "0…11",
    ),
    "index negative": (lambda w: ix.pbrf(w.f.risk, w.model, indices=[-1]), "got -1", "mean 11"),
    "index mask": (
        lambda w: ix.pbrf(w.f.risk, w.model, indices=np.ones(N, bool)),
        "of bool",
        r"np\.flatnonzero\(mask\)",
    ),
    "pbrf outcome": (
        lambda w: ix.pbrf(w.f.risk, w.model, outcome="loss"),
        "`outcome` must be a function .*got 'loss'",
        "None answers",
    ),
    "pbrf chunk": (
        lambda w: ix.pbrf(w.f.risk, w.model, chunk_size=0),
        "at least 1, got 0",
        "None chooses",
    ),
    "outcome": (
        lambda w: ix.leave_one_out(w.f.risk, w.model, ix.Newton(), outcome=3),
        "`outcome` must be a function .*got 3",
        "None answers its parameters",
    ),
    "subset masks": (
        lambda w: ix.leave_subset_out(w.f.risk, w.model, ix.Newton(), masks=-MASKS - 1),
        r"at least 0, got -\d.0 at \[0, 0\]",
        "1 keeps a point, 0 erases it",
    ),
    "subset mask NaN": (
        lambda w: ix.leave_subset_out(w.f.risk, w.model, ix.Newton(), masks=MASKS * np.nan),
        r"finite.*got nan at \[0, 0\]",
        "1 keeps a point",
    ),
    "subset members": (
        lambda w: ix.leave_subset_out(w.f.risk, w.model, ix.Newton(), masks=[[0, 1], [2]]),
        "rows of different lengths",
        r"np\.isin",
    ),
    "subset shape": (
        lambda w: ix.leave_subset_out(w.f.risk, w.model, ix.Newton(), masks=MASKS.T),
        r"shape \[k, 12\].*\(12, 6\)",
        r"mask\[None\]",
    ),
    "pbrf damping": (lambda w: ix.pbrf(w.f.risk, w.model, damping=-1.0), "got -1.0", "damping=0."),
    "lds strings": (
        lambda w: ix.lds("scores", MASKS, np.ones((6, 2))),
        "`scores` must be an array of real numbers",
        r"f\(queries\)",
    ),
    "lds transposed": (
        lambda w: ix.lds(np.ones((2, N)), MASKS, np.ones((2, 6))),
        r"outcomes \(2, 6\)",
        "Transpose `outcomes`",
    ),
    "lds NaN": (
        lambda w: ix.lds(np.full((2, N), np.nan), MASKS, np.ones((6, 2))),
        r"`scores` is NaN or infinite at \[0, 0\]",
        "Leave that query or mask out",
    ),
    "lds masks": (
        lambda w: ix.lds(np.ones((2, N)), MASKS[:3], np.ones((3, 2))),
        "at least 4 masks and a query, got 3",
        "more subsets",
    ),
    "subsampled memorization without subsets": (
        lambda w: ix.subsampled_memorization(w.f.risk, w.model, ix.Newton()),
        "drawn at random",
        "pass `key=",
    ),
    "subsampled memorization of rare points": (
        lambda w: ix.subsampled_memorization(w.f.risk, w.model, ix.Newton(), masks=np.eye(N)),
        "fewer than 2 subsets of 12.*in 1, out of 11",
        "Raise `trials`",
    ),
    "subsampled memorization of an unknown outcome": (
        lambda w: ix.subsampled_memorization(
            w.f.risk, w.model, ix.Newton(), key=jr.key(0), outcome="accuracy"
        ),
        "got 'accuracy'",
        "a function of .model, example.",
    ),
    "subsampled memorization of classes": (
        lambda w: ix.subsampled_memorization(
            w.f.risk, w.model, ix.Newton(), key=jr.key(0), outcome=lambda m, z: z[1]
        ),
        "got int64 of shape",
        "must answer a floating-point number.*astype",
    ),
    "subsampled memorization of a regression": (
        lambda w: ix.subsampled_memorization(
            w.squares.risk, w.squares.model, ix.Newton(), key=jr.key(0)
        ),
        "SquaredError is no classifier",
        "measure",
    ),
    "tier": (lambda w: ix.certify(w.f, tier=3), "got 3", "whole number, in 1…2"),
    "refine": (lambda w: ix.certify(w.f, tier=2, refine=1), "refine=1 at tier=2", "Use tier=1"),
    "renormalise": (
        lambda w: ix.certify(w.f, tier=2, renormalise=True),
        "renormalise=True at tier=2",
        "Use tier=1",
    ),
    "renormalise a single point": (
        lambda w: ix.certify(
            eqx.tree_at(lambda f: f.risk.weights, w.f, jnp.eye(N)[3]), renormalise=True
        ),
        "only one has a weight above 0",
        "Leave it out",
    ),
    "certify mean of classes": (
        lambda w: ix.certify(ix.classification(w.f, "probability"), (Xq, yq), mean=True),
        r"this measurement has \(3,\)",
        "class_=0",
    ),
    "bound of a removal": (
        lambda w: ix.restriction_bound(w.first, lambda m: m.bias, (Xq, yq)),
        "encloses plain influence",
        "without `relative`, `removal` or `groups`",
    ),
    "bound fraction of steps": (
        lambda w: ix.restriction_bound(w.f, lambda m: m.bias, (Xq, yq), steps=2.5),
        "`steps`.*got 2.5",
        "a whole number, at least 1",
    ),
    "restrict twice": (
        lambda w: ix.restrict(risk(), w.model, lambda m: (m.bias, m.bias)),
        "a parameter twice",
        "Name each",
    ),
    "certify index": (lambda w: ix.certify(w.f, indices=[N]), "got 12", "0…11"),
    "certify mean": (lambda w: ix.certify(w.f, mean=True), "averages over queries", "pass them"),
}
COMBINATIONS = {
    "relative of a removal": (
        lambda w: ix.relative(w.first),
        "predicted change on removal has a unit of its own",
        "without `removal`",
    ),
    "relative of a Newton removal": (
        lambda w: ix.relative(w.newton, ix.Reference(0)),
        "unit of its own",
        "without `removal`",
    ),
    "removal of a relative": (
        lambda w: ix.removal(w.relative),
        "no relative form",
        r"removal\(influence\(\.\.\.\), kind\)",
    ),
    "Newton removal of a relative": (
        lambda w: ix.removal(w.relative, "newton"),
        "no relative form",
        "without `removal`",
    ),
    "relative of groups": (
        lambda w: ix.relative(w.groups),
        "group has no size of its own",
        "without `groups`",
    ),
    "groups of a relative": (
        lambda w: ix.groups(w.relative, MASKS),
        "do not add up",
        "without `relative`",
    ),
    "groups of a Newton removal": (
        lambda w: ix.groups(w.newton, MASKS),
        "do not add up",
        '"first-order".*leave_subset_out',
    ),
    "Newton removal of groups": (
        lambda w: ix.removal(w.groups, "newton"),
        "removes single points",
        '"first-order".*leave_subset_out',
    ),
    "second order of a relative": (
        lambda w: ix.groups(w.relative, MASKS, order=2),
        "do not add up",
        "without `relative`",
    ),
    "relative of second-order groups": (
        lambda w: ix.relative(ix.groups(w.f, MASKS, order=2)),
        "group has no size of its own",
        "without `groups`",
    ),
    "second order of a Newton removal": (
        lambda w: ix.groups(w.newton, MASKS, order=2),
        "do not add up",
        r'order=2\), "first-order".*leave_subset_out',
    ),
    "Newton removal of second-order groups": (
        lambda w: ix.removal(ix.groups(w.f, MASKS, order=2), "newton"),
        "removes single points",
        r"order=2.*leave_subset_out",
    ),
    "subset of groups": (
        lambda w: ix.most_influential_subset(w.groups, (Xq, yq), 2),
        "its own groups",
        "without `groups`",
    ),
    "subset of a relative": (
        lambda w: ix.most_influential_subset(w.relative, (Xq, yq), 2),
        "a group has none of its own",
        "without `relative`",
    ),
    "subset of Newton removals": (
        lambda w: ix.most_influential_subset(w.newton, (Xq, yq), 2),
        "do not add up",
        '"first-order"',
    ),
    "top_k of groups": (
        lambda w: ix.top_k(w.groups, (Xq, yq), 2),
        "ranks training points",
        "without `groups`",
    ),
    "value of groups": (lambda w: ix.value(w.groups, (Xq, yq)), "plain influence", "`influence"),
    "value of a relative": (
        lambda w: ix.value(w.relative, (Xq, yq)),
        "plain",
        "before .*`relative`",
    ),
    "value of a removal": (lambda w: ix.value(w.first, (Xq, yq)), "plain", "before .*`removal`"),
    "value of a probability": (
        lambda w: ix.value(ix.classification(w.f, class_=0), (Xq, yq)),
        "plain influence on the loss",
        "before `classification`",
    ),
    "bound of a relative": (
        lambda w: ix.restriction_bound(w.relative, lambda m: m.bias, (Xq, yq)),
        "encloses plain influence",
        "without `relative`, `removal` or `groups`",
    ),
    "bound of groups": (
        lambda w: ix.restriction_bound(w.groups, lambda m: m.bias, (Xq, yq)),
        "encloses plain influence",
        "without `relative`, `removal` or `groups`",
    ),
    "the whole model of a part's risk": (
        lambda w: ix.influence(ix.restrict(risk(), w.model, lambda m: m.bias)[0], w.model),
        "restricted to a part of its model with 1 leaves.*something with 2",
        "use the risk before `restrict`",
    ),
    "a measurement of pairs": (
        lambda w: ix.measure(w.f, lambda m, x: m(x)[0])((Xq, yq)),
        r"cannot be called on the query float64\[4\], int64\[\]",
        "of exactly what `f.queries.` is given",
    ),
    "a measurement without a query": (
        lambda w: ix.measure(w.f, lambda m: m.bias.sum())(Xq),
        "`fn.model, query.` cannot be called",
        "one row",
    ),
    "certify a relative": (
        lambda w: ix.certify(w.relative, (Xq, yq)),
        "encloses removals of single points",
        "without `relative`",
    ),
    "certify groups": (
        lambda w: ix.certify(w.groups, (Xq, yq)),
        "encloses removals of single points",
        "or `groups`",
    ),
    "certify a network": (
        lambda w: ix.certify(w.network),
        "affine in the parameters, and these are not",
        r"influx\.restrict\(risk, model, lambda m: m\.layers\[-1\]\)",
    ),
    "certify without l2": (
        lambda w: ix.certify(w.part_penalised),
        "l2 > 0 on every kept parameter.*some have 0",
        "small l2, or freeze them",
    ),
    "certify in float32": (
        lambda w: ix.certify(w.single),
        "needs float64, the parameters are float32",
        "jax_enable_x64",
    ),
    "certify a regression": (
        lambda w: ix.certify(w.squares),
        "no classifier",
        "SoftmaxCrossEntropy or BinaryCrossEntropy",
    ),
    "certify a custom loss": (
        lambda w: ix.certify(w.custom, (X, Y)),
        "CustomLoss has no known bounds",
        "Use SoftmaxCrossEntropy or BinaryCrossEntropy",
    ),
    "certify a custom measurement": (
        lambda w: ix.certify(ix.measure(w.f, lambda m, q: m(q[0])), (Xq, yq)),
        "custom measurement has no known bounds",
        r'influx\.classification\(f, "margin"',
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_arguments_of_the_verbs_are_refused(name):
    trigger, cause, remedy = VERBS[name]
    refused(functools.partial(trigger, world()), cause, remedy)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_what_does_not_combine_is_refused(name):
    trigger, cause, remedy = COMBINATIONS[name]
    refused(functools.partial(trigger, world()), cause, remedy)


# What a point adds to these curvatures is not known, alone or inside a solver.
NO_NEWTON_STEP = {
    "exact Fisher": ix.Fisher("exact"),
    "sampled Fisher": ix.Fisher("sampled", key=jr.key(0), draws=2),
    "empirical Fisher": ix.Fisher("empirical"),
    "blocks": ix.BlockDiagonal(ix.GaussNewton()),
    "diagonal": ix.Diagonal(ix.Hessian()),
    "identity": ix.Identity(),
    "CG of a Fisher": ix.CG(ix.Fisher("empirical")),
    "MINRES of blocks": ix.MINRES(ix.BlockDiagonal()),
}
NEEDS_NEWTON_STEP = {
    "removal": lambda f: ix.removal(f, "newton"),
    "memorization": lambda f: ix.memorization(f, "newton"),
    "certify": ix.certify,
    "certify a query": lambda f: ix.certify(f, (Xq, yq)),
}


@pytest.mark.parametrize("curvature", NO_NEWTON_STEP)
def test_a_newton_step_needs_a_curvature_that_knows_single_points(curvature):
    f = ix.influence(risk(), world().model, NO_NEWTON_STEP[curvature])
    name = repr(NO_NEWTON_STEP[curvature]).split("(")[0]
    for verb in NEEDS_NEWTON_STEP.values():
        refused(
            lambda verb=verb: verb(f),
            rf"{name}.* does not say what one point adds",
            r"Hessian\(\) or GaussNewton\(\), or (the first order: `removal\(f|one of them in CG)",
        )
    assert np.isfinite(ix.removal(f, "first-order")((Xq, yq))).all()  # the remedy works


# --- What only the work itself can find out -------------------------------------------------------


def test_a_curvature_that_cannot_be_inverted_is_refused():
    singular = r"curvature is singular: its smallest eigenvalue is"
    remedy = r"positive damping \(say damping=.*l2 > 0"
    with pytest.raises(ValueError, match=f"{singular}.*{remedy}"):
        ix.influence(risk(l2=0.0), world().model)
    concave = ix.CustomLoss(lambda o, t: -jnp.sum((o - t) ** 2))
    with pytest.raises(ValueError, match=r"indefinite: its smallest eigenvalue is -.*GaussNewton"):
        ix.influence(risk((X, Y), concave), linear_model())
    with pytest.raises(ValueError, match=r"indefinite: .*at most -.*Use damping > .*MINRES"):
        ix.influence(risk((X, Y), concave), linear_model(), ix.CG(ix.Hessian()))
    with pytest.raises(ValueError, match=r"entry 0, .*not positive.*positive damping"):
        ix.influence(risk((0 * X, y), l2=0.0), world().model, ix.Diagonal())
    # The least value of `damping` that the message names is indeed enough.
    advised = re.search(r"damping=([0-9.e+-]+)", str(_error(lambda: meet((X, Y), concave))))
    assert advised is not None
    ix.influence(risk((X, Y), concave), linear_model(), ix.Hessian(damping=float(advised[1])))


def _error(trigger) -> Exception:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        trigger()
    return caught.value


@pytest.mark.parametrize("curvature", [ix.Hessian(), ix.KFAC("empirical"), ix.EKFAC("empirical")])
def test_a_loss_that_overflows_is_refused_by_its_curvature(curvature):
    root = ix.CustomLoss(lambda o, t: jnp.sum(jnp.sqrt(jnp.square(o))))
    still = jtu.tree_map(jnp.zeros_like, linear_model())
    with pytest.raises(ValueError, match=r"NaN or infinite entries: .*log\(0\), 0/0 or sqrt\(0\)"):
        ix.influence(risk(loss=root), still, curvature)


def test_a_fisher_of_a_loss_without_a_distribution_is_refused():
    custom, model = world().custom.risk, world().model
    with pytest.raises(ValueError, match=r'no exact Fisher. Use Fisher\("sampled"\)'):
        ix.influence(custom, model, ix.Fisher("exact"))
    with pytest.raises(ValueError, match=r"labels drawn from the model. Write .*sample="):
        ix.influence(custom, model, ix.Fisher("sampled", key=jr.key(0)))


# --- inside a trace there are no numbers to look at --------------------------------------------------

DECIDES = {
    "fit": lambda w, m: ix.fit(w.f.risk, m, ix.Newton()),
    "leave_one_out": lambda w, m: ix.leave_one_out(w.f.risk, m, ix.Newton()),
    "leave_subset_out": lambda w, m: ix.leave_subset_out(w.f.risk, m, ix.Newton(), masks=MASKS),
    "subsampled_memorization": lambda w, m: ix.subsampled_memorization(
        w.f.risk, m, ix.Newton(), key=jr.key(0)
    ),
    "pbrf": lambda w, m: ix.pbrf(w.f.risk, m),
    "check": lambda w, m: ix.testing.check(w.f.risk, m),
    "certify": lambda w, m: ix.certify(ix.influence(w.f.risk, m)),
    "diagnose": lambda w, m: ix.diagnose(ix.influence(w.f.risk, m)),
    "restriction_bound": lambda w, m: ix.restriction_bound(
        ix.influence(w.f.risk, m), lambda k: k.bias, (Xq, yq)
    ),
}


@pytest.mark.parametrize("verb", DECIDES)
def test_verbs_that_decide_are_refused_inside_a_trace(verb):
    traced = eqx.filter_jit(lambda model: DECIDES[verb](world(), model))
    with pytest.raises(ValueError, match=f"`{verb}` looks at numbers.*Call it outside"):
        traced(world().model)


# --- The counter counts, and good input passes ----------------------------------------------------


def test_the_model_counts_its_executions():
    f = world().f
    for work in (
        lambda: meet(),
        lambda: f((Xq, yq)),
        lambda: ix.self_influence(f),
        lambda: ix.top_k(f, (Xq, yq), 2),
        lambda: ix.leave_one_out(f.risk, f.model, ix.Newton(), indices=[0]),
    ):
        before = executions()
        work()
        assert executions() > before


def test_neighbours_of_bad_input_pass():
    """The checks refuse no more than they say."""
    model = linear_model()
    params = eqx.filter(model, eqx.is_inexact_array)
    want = float(risk().objective(model))
    for same in (
        risk((X, y.astype(np.uint8))),
        risk((jnp.asarray(X), jnp.asarray(y, jnp.int32))),
        risk(weights=np.ones(N, bool)),
        risk(weights=[1] * N),
        risk(l2=np.float64(0.1)),
        risk(l2=jtu.tree_map(lambda _: 0.1, params)),
        risk(l2=jtu.tree_map(lambda p: 0.1 * jnp.ones_like(p), params)),
    ):
        ix.restrict(same, model, lambda m: m.bias)  # makes every check
        assert float(same.objective(model)) == pytest.approx(want, rel=1e-14)
    ix.restrict(risk((X, None), ix.CustomLoss(lambda o, _: o[0])), model, lambda m: m.bias)
    boolean = risk((X, y > 0), ix.BinaryCrossEntropy())
    integer = risk((X, (y > 0).astype(int)), ix.BinaryCrossEntropy())
    np.testing.assert_array_equal(boolean.losses(scalar_model()), integer.losses(scalar_model()))


def test_whole_numbers_and_flags_of_numpy_pass():
    f, two = world().f, np.int64(2)
    want = ix.top_k(f, (Xq, yq), 2)
    found = ix.top_k(f, (Xq, yq), two, chunk_size=two)
    np.testing.assert_allclose(found.highest.values, want.highest.values, rtol=1e-12)
    g = ix.influence(f.risk, f.model, chunk_size=two, memory=np.int64(10**8))
    np.testing.assert_allclose(g((Xq, yq)), f((Xq, yq)), rtol=1e-12)
    left = ix.leave_one_out(f.risk, f.model, ix.Newton(), indices=[0, 1, 2], chunk_size=two)
    assert jtu.tree_leaves(left)[0].shape[0] == 3
    proven = ix.certify(f, (Xq, yq), mean=np.bool_(True), tier=np.int64(1), refine=np.int64(1))
    assert proven.lower.shape == (N,)
    subset = ix.most_influential_subset(f, (Xq, yq), size=two, mean=np.bool_(False))
    assert subset.indices.shape == (len(yq), 2)


def test_numbers_of_numpy_are_numbers():
    assert ix.EKFAC(tolerance=np.float32(0.25)).tolerance == 0.25
    assert ix.CG(ix.Hessian(), rtol=np.float32(0.25)).rtol == 0.25
    assert ix.Newton(tolerance=np.float32(0.25)).tolerance == 0.25
    assert ix.SGD(optax.sgd(0.1), batch_size=np.int64(4), epochs=1, key=jr.key(0)).batch_size == 4


VERBS_OF_AN_INFLUENCE = {
    "call of a transform": lambda r: ix.removal(r),
    "classification": lambda r: ix.classification(r, "margin"),
    "relative": lambda r: ix.relative(r, "self"),
    "groups": lambda r: ix.groups(r, np.ones((1, N))),
    "measure": lambda r: ix.measure(r, lambda m, x: jnp.sum(m(x))),
    "self_influence": lambda r: ix.self_influence(r),
    "memorization": lambda r: ix.memorization(r),
    "value": lambda r: ix.value(r, (Xq, yq)),
    "top_k": lambda r: ix.top_k(r, (Xq, yq), 2),
    "certify": lambda r: ix.certify(r),
    "diagnose": lambda r: ix.diagnose(r),
    "plan": lambda r: ix.plan(r, (Xq, yq)),
    "coverage": lambda r: ix.coverage(r),
    "restriction_bound": lambda r: ix.restriction_bound(r, lambda m: m.weight, (Xq, yq)),
    "most_influential_subset": lambda r: ix.most_influential_subset(r, (Xq, yq), size=2),
}


@pytest.mark.parametrize("verb", VERBS_OF_AN_INFLUENCE)
def test_a_risk_is_no_influence(verb):
    with pytest.raises(ValueError, match=r"takes what `influx.influence.*got EmpiricalRisk"):
        VERBS_OF_AN_INFLUENCE[verb](risk())


RULES = {
    "bias forgotten": ({eqx.nn.Linear: lambda l, x: l.weight @ x}, "something else than by itself"),
    "another shape": ({eqx.nn.Linear: lambda l, x: x[:1]}, "something else than by itself"),
    "cannot be called": ({eqx.nn.Linear: lambda l, x: l.kernel @ x}, "cannot be called.*kernel"),
    "no such layer": ({eqx.nn.MLP: lambda l, x: x}, "a rule for MLP, and the model has no layer"),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_that_are_not_their_layer_are_refused(case):
    rules, words = RULES[case]
    with pytest.raises(ValueError, match=words):
        ix.influence(risk(), linear_model(), ix.EKFAC(rules=rules))


def test_a_rule_that_is_its_layer_changes_nothing():
    rules = {eqx.nn.Linear: lambda l, x: l.weight @ x + l.bias}
    scores = lambda curvature: ix.influence(risk(), linear_model(), curvature)((Xq, yq))
    np.testing.assert_allclose(scores(ix.EKFAC(rules=rules)), scores(ix.EKFAC()), rtol=1e-12)


PLACES = {
    "nothing": (lambda m: (), "selects nothing"),
    "no such part": (lambda m: m.nope, "must select a part.*nope"),
    "an entry": (lambda m: m.weight[0], "must select a part"),
    "twice": (lambda m: (m.weight, m.weight), "a parameter twice"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_mixture_refuses_what_selects_no_part(case):
    where, words = PLACES[case]
    with pytest.raises(ValueError, match=words):
        ix.influence(risk(), linear_model(), ix.Mixture({where: ix.GaussNewton()}, ix.EKFAC()))


def test_floats_do_not_stand_for_whole_numbers():
    pixels = np.arange(N * D).reshape(N, D)
    scaled = lambda m, x: m(x.astype(float) / 255)
    of_pixels = risk((pixels.astype(np.uint8), y), predict=scaled)
    fitted = ix.influence(of_pixels, linear_model())
    with pytest.raises(ValueError, match=r"are float64, the training data's are uint8.*scale"):
        fitted((pixels[:2] / 255, y[:2]))
    other = fitted((pixels[:2], y[:2]))  # another kind of whole number is no other number
    np.testing.assert_array_equal(other, fitted((pixels[:2].astype(np.uint8), y[:2])))


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: ix.classification(f, "margin")])
def test_a_label_that_is_no_class_is_no_silent_zero_in_a_trace(transform):
    g = transform(world().f)
    with pytest.raises(RuntimeError, match=r"measurement.*is NaN"):
        jax.block_until_ready(eqx.filter_jit(lambda q: g(q))((Xq, jnp.asarray(yq) + 5)))


def test_a_measurement_that_is_nan_is_not_the_solver_s_fault():
    g = ix.measure(world().f, lambda m, x: jnp.nan * jnp.sum(m(x)))
    with pytest.raises(RuntimeError, match=r"gradient of the measurement.*is NaN"):
        jax.block_until_ready(g(Xq))


def test_what_looks_at_numbers_says_so_in_a_trace():
    scores = lambda r, m: ix.influence(r, m, ix.EKFAC(damping=0.1, tolerance=0.1))((Xq, yq))
    with pytest.raises(ValueError, match=r"`EKFAC\(tolerance=0.1\)` looks at numbers.*outside"):
        eqx.filter_jit(scores)(risk(), linear_model())
    damped = lambda λ: (
        ix.KFAC(damping=λ, tolerance=0.1).factor(risk(), linear_model()).blocks[0].values
    )
    with pytest.raises(ValueError, match=r"`KFAC\(tolerance=0.1\)` looks at numbers.*outside"):
        jax.jit(damped)(0.1)
    with pytest.raises(ValueError, match=r"`lds` looks at numbers.*outside"):
        jax.jit(ix.lds)(np.ones((3, N)), np.ones((5, N)), np.ones((5, 3)))


@pytest.mark.parametrize("curvature", [ix.GaussNewton, ix.Identity, ix.KFAC, ix.EKFAC])
def test_a_negative_damping_is_an_error_in_a_trace_as_well(curvature):
    scores = eqx.filter_jit(
        lambda λ: ix.influence(risk(), linear_model(), curvature(damping=λ))((Xq, yq))
    )
    jax.block_until_ready(scores(jnp.asarray(0.1)))
    with pytest.raises(RuntimeError, match="must be at least 0"):
        jax.block_until_ready(scores(jnp.asarray(-0.05)))


@pytest.mark.parametrize("curvature", [ix.KFAC, ix.EKFAC])
def test_a_singular_block_is_an_error_in_a_trace_as_well(curvature):
    data = jnp.asarray(X).at[:, 0].set(0.0), jnp.asarray(y)
    scores = eqx.filter_jit(
        lambda r, λ: ix.influence(r, linear_model(), curvature(damping=λ))((Xq, yq))
    )
    jax.block_until_ready(scores(risk(data, l2=0.0), jnp.asarray(0.1)))
    jax.block_until_ready(scores(risk(data, l2=0.1), jnp.asarray(0.0)))
    of_bias = jtu.tree_map(jnp.zeros_like, linear_model())
    of_bias = eqx.tree_at(lambda m: m.bias, of_bias, jnp.full_like(of_bias.bias, 0.1))
    for l2 in (0.0, of_bias):
        with pytest.raises(RuntimeError, match=r"curvature of .*weight.* is singular"):
            jax.block_until_ready(scores(risk(data, l2=l2), jnp.asarray(0.0)))


@pytest.mark.parametrize("settings", [{"draws": 5}, {"key": jr.key(0)}])
def test_settings_of_a_sampled_fisher_are_refused_by_the_default(settings):
    with pytest.raises(ValueError, match='are those of fisher="sampled"'):
        ix.EKFAC(**settings)


def test_negative_masks_are_no_data_weights():
    with pytest.raises(ValueError, match=r"at least 0, got -1.0 at \[0, 0\]"):
        ix.lds(np.ones((3, N)), -np.ones((5, N)), np.ones((5, 3)))


@pytest.mark.parametrize("trainer", [ix.Newton(), ix.LBFGS()], ids=["newton", "lbfgs"])
def test_a_tolerance_out_of_reach_is_refused_before_training(trainer):
    data = X.astype(np.float32), y
    single = jtu.tree_map(lambda p: p.astype(jnp.float32), linear_model())
    with pytest.raises(ValueError, match=r"1e-10, is out of reach in float32.*tolerance=1e-6"):
        ix.leave_one_out(risk(data), single, trainer)


OUTCOMES = {
    "nan": (
        lambda m, z: jnp.nan * jnp.sum(m.weight),
        "the model given and the first training point",
    ),
    "nan of some": (lambda m, z: jnp.log(jnp.sum(m.bias) * 0), "is NaN or infinite"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_an_outcome_that_is_nan_is_refused(case):
    outcome, words = OUTCOMES[case]
    with pytest.raises(ValueError, match=words):
        ix.subsampled_memorization(
            risk(), linear_model(), ix.Newton(), key=jr.key(0), trials=40, outcome=outcome
        )


CHECKS = {
    "points": (dict(points=0), "`points`.*got 0"),
    "seed": (dict(seed="a"), "`seed`.*got 'a'"),
    "trainer": (dict(trainer=3), "`trainer`.*got 3"),
    "curvature": (dict(curvature=3), "curvature such as.*got 3"),
}


@pytest.mark.parametrize("case", CHECKS)
def test_check_refuses_settings_before_it_works(case):
    settings, words = CHECKS[case]
    with pytest.raises(ValueError, match=words):
        ix.testing.check(risk(), linear_model(), **settings)
