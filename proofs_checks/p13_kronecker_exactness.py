"""P13. Where K-FAC and EK-FAC are exact, and how near they are elsewhere.

STATEMENT
    A layer z_t = W a_t (the bias a column of W), places t where W is shared, g_tr = ∂/∂z_t of the r-th
    row of a square root of the loss's Fisher in output space. The layer's block of the Fisher matrix is
        F = (1/n) Σᵢ wᵢ Σ_r vec(Σ_t g_tr a_tᵀ) vec(·)ᵀ;
    K-FAC's is G⊗A with G = (1/n) Σ wᵢ Σ_tr g gᵀ, A = (1/(w̄T)) Σ wᵢ Σ_t a aᵀ, w̄ = Σ wᵢ. All undamped.
    (a) One datum, no sharing: G⊗A = F for any layer and loss. So EK-FAC is exact too.
    (b) A network of linear layers only, squared error, any data: G⊗A = F for every layer.
    (c) Shared places: where each place has an output and a squared error of its own (or the layer is
        called twice, on two inputs), "expand" is exact for a linear layer; where outputs are averaged
        over places, "reduce" is exact. The other of the two is not.
    (d) EK-FAC, Q diag(Λ) Qᵀ with Q = Q_G⊗Q_A and Λ = diag(QᵀFQ), is the nearest to F in Frobenius norm
        of all matrices with eigenvectors Q: ‖F − EK-FAC‖ ≤ ‖F − K-FAC‖; its trace is F's.
    (e) The terms p, q that stand for R = 1/(Λ + l2 + λ) leave out at most the share `tolerance`:
            ‖diag(s)(R − Σ_ρ p⊗q)diag(t)‖ ≤ tolerance · ‖diag(s) R diag(t)‖  in Frobenius norm,
        s and t the factors' eigenvalues, and no fewer terms do.

ASSUMPTIONS
    The same Fisher in F and in the factors. (d), (e) need nothing else.

PROOF
    (a) The sum over i has one term: F = (w/n) Σ_r g_r g_rᵀ ⊗ a aᵀ, and G = (w/n) Σ g gᵀ, A = a aᵀ.
    (b) ∂output/∂z = B does not depend on i, the root of the Fisher is I, so the rows of B are g_r:
        F = (1/n) Σ wᵢ BᵀB ⊗ aᵢaᵢᵀ = (w̄/n) BᵀB ⊗ (1/w̄) Σ wᵢaᵢaᵢᵀ, which are G and A.
    (c) Own errors: the rows r are pairs (place, output), g_tr = e_k where r = (t, k), else 0. So
        F = (1/n) Σ wᵢ Σ_t I⊗a_t a_tᵀ = G⊗A since G = (w̄T/n) I. Two calls are two places. Averages: the
        output is W ā, ā the mean of a_t, so F = (w̄/n) I⊗(1/w̄)Σ wᵢ āāᵀ; "reduce" sums g_t = e_k/T to e_k
        and takes ā. "Expand" has Σ a_t a_tᵀ/T ≠ āāᵀ there, unless all a_t are equal.
    (d) ‖F − Q D Qᵀ‖² = ‖QᵀFQ − D‖² is a sum of squares over entries; D touches the diagonal only, and is
        best where it equals it. K-FAC is Q D Qᵀ with D its own eigenvalues. tr Q diag(Λ) Qᵀ = tr F.
    (e) Eckart–Young–Mirsky for the weighted matrix; the rank is the least whose tail is small enough.
        ∎

CHECK
    The library's operators as dense matrices, against F from Jacobians in NumPy. (a)–(c) to rounding,
    with λ = 0.02, far below the median of the spectrum, and l2 by leaf (its diagonal in the eigenbasis).

SOURCE
    (a), (b), (c): F. Dangel et al., "Kronecker-factored Approximate Curvature (KFAC) From Scratch",
    arXiv:2507.05127; R. Eschenhagen et al., arXiv:2311.00636. (d): T. George et al., arXiv:1806.03884.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import influx as ix

from . import _kronecker as kronecker
from . import _library as library
from . import _mutants as mutants
from ._errors import above, apart, gap
from ._problems import BINARY, NETWORK, SOFTMAX, SQUARED_NETWORK, problems
from ._registry import Proposition, register

LAMBDA, TOLERANCE = 0.02, 0.1


def library_curvature(risk, model, name: str, **settings):
    return {"kfac": ix.KFAC, "ekfac": ix.EKFAC}[name](**settings).factor(risk, model)


@dataclass(frozen=True)
class Subject:
    """`factor(risk, model, name, **settings)` answers the factored curvature."""

    factor: Callable
    seen: Callable = lambda problem: problem


SUBJECT = Subject(library_curvature)


@eqx.filter_jit
def _dense(factored):
    size = sum(block.layer.size for block in factored.blocks)
    return jax.vmap(factored.matvec)(jnp.eye(size))


def check(problem, subject) -> dict[str, float]:
    return {
        **one_datum(problem, subject),
        **against_numpy(problem, subject),
        **linear_network(problem, subject),
        **sharing(problem, subject),
        **terms(problem, subject),
    }


def at(problem, subject, name: str, **settings) -> np.ndarray:
    """The library's H + λI."""
    problem = subject.seen(problem)
    risk, model = library.risk_of(problem), library.model_at(problem.family, problem.theta)
    return np.asarray(_dense(subject.factor(risk, model, name, damping=LAMBDA, **settings)))


def fisher(problem) -> np.ndarray:
    """The block diagonal of the Fisher matrix, l2 contained."""
    H = np.diag(problem.penalty)
    for layer in kronecker.layers(problem):
        flat = layer.places.reshape(-1)
        H[np.ix_(flat, flat)] += kronecker.block(problem, layer)
    return H


def one_datum(problem, subject) -> dict[str, float]:
    one = np.flatnonzero(problem.w)[:1]
    single = replace(
        problem, X=problem.X[one], y=problem.y[one], w=problem.w[one], l2=_even(problem)
    )
    truth = fisher(single) + LAMBDA * np.eye(problem.theta.size)
    return {f"one datum {c}": gap(at(single, subject, c), truth) for c in ("kfac", "ekfac")}


def _even(problem) -> np.ndarray:
    """The same l2 for the weight and the bias of a layer: a multiple of I in every basis."""
    return np.repeat(problem.l2[::2], 2)


def against_numpy(problem, subject) -> dict[str, float]:
    even = replace(problem, l2=_even(problem))
    F, damped = fisher(even), LAMBDA * np.eye(problem.theta.size)
    got = {name: at(even, subject, name) - damped for name in ("kfac", "ekfac")}
    distance = {name: np.linalg.norm(F - H) for name, H in got.items()}
    uneven = at(problem, subject, "ekfac")
    return {
        "K-FAC": gap(got["kfac"], kronecker.kfac(even)),
        "EK-FAC": gap(got["ekfac"], kronecker.ekfac(even)),
        "empirical": gap(
            at(even, subject, "ekfac", fisher="empirical") - damped,
            kronecker.ekfac(even, "empirical"),
        ),
        "nearer": above(distance["ekfac"], distance["kfac"]),
        "trace": gap(np.trace(got["ekfac"]), np.trace(F)),
        "trace of l2": gap(np.trace(uneven - damped), np.trace(fisher(problem))),
    }


class Stack(eqx.Module):
    """Two linear layers with nothing in between."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, x):
        return self.last(self.first(x))


class Places(eqx.Module):
    """One layer at all places: their outputs, or the mean of them."""

    layer: eqx.nn.Linear
    mean: bool = eqx.field(static=True)

    def __call__(self, x):
        out = jax.vmap(self.layer)(x)
        return jnp.mean(out, axis=0) if self.mean else out


class Twice(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, x):
        return jnp.stack([self.layer(x[0]), self.layer(x[1])])


@cache
def models(kind: str):
    a, b = jr.split(jr.key(3))
    layer = eqx.nn.Linear(3, 2, key=a)
    made = {
        "stack": Stack(layer, eqx.nn.Linear(2, 2, key=b)),
        "own": Places(layer, False),
        "mean": Places(layer, True),
        "twice": Twice(layer),
    }
    return made[kind]


def _regression(problem, places: int | None, outputs: tuple[int, ...]):
    """Data of the problem's seed and weights, for the models of this module."""
    rng = np.random.default_rng(problem.seed)
    shape = (problem.n, 3) if places is None else (problem.n, places, 3)
    X, y = rng.normal(size=shape) + 0.4, rng.normal(size=(problem.n, *outputs))
    weights = jnp.asarray(problem.w)
    data = jnp.asarray(X), jnp.asarray(y)
    return X, ix.EmpiricalRisk(data, ix.SquaredError(), l2=problem.l2[0], weights=weights)


def _one(a: np.ndarray) -> np.ndarray:
    return np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)


def linear_network(problem, subject) -> dict[str, float]:
    seen = subject.seen(problem)
    X, risk = _regression(seen, None, (2,))
    model, w = models("stack"), problem.w
    W1, b1 = (np.asarray(x) for x in (model.first.weight, model.first.bias))
    B = np.asarray(model.last.weight)
    parts = [(B.T @ B, _one(X)), (np.eye(2), _one(X @ W1.T + b1))]
    truth = [np.kron(G, np.einsum("n,ni,nj->ij", w / problem.n, h, h)) for G, h in parts]
    return {
        f"linear network {name}": _blocks_gap(subject, risk, model, name, truth, problem)
        for name in ("kfac", "ekfac")
    }


def sharing(problem, subject) -> dict[str, float]:
    w, n = problem.w, problem.n
    found = {}
    for kind, places, outputs, right in (
        ("own", 4, (4, 2), "expand"), ("twice", 2, (2, 2), "expand"), ("mean", 4, (2,), "reduce"),
    ):  # fmt: skip
        X, risk = _regression(subject.seen(problem), places, outputs)
        a = _one(X)
        each = np.einsum("nti,ntj->nij", a, a)
        if kind == "mean":
            each = np.einsum("ni,nj->nij", a.mean(axis=1), a.mean(axis=1))
        truth = [np.kron(np.eye(2), np.einsum("n,nij->ij", w / n, each))]
        model = models(kind)
        run = lambda way, risk=risk, model=model: _blocks(subject, risk, model, "kfac", sharing=way)
        want = [_with_penalty(block, problem) for block in truth]
        found[f"{kind}: {right}"] = gap(run(right)[0], want[0])
        if kind == "mean":
            found["mean: expand is not exact"] = apart(run("expand")[0], want[0], least=1e-3)
    return found


def _blocks_gap(subject, risk, model, name, truth, problem) -> float:
    got = _blocks(subject, risk, model, name)
    return max(gap(a, _with_penalty(b, problem)) for a, b in zip(got, truth))


def _with_penalty(block: np.ndarray, problem) -> np.ndarray:
    return block + (problem.l2[0] + LAMBDA) * np.eye(len(block))


def _blocks(subject, risk, model, name, **settings) -> list[np.ndarray]:
    """Each layer's block, by rows of [W, b]."""
    factored = subject.factor(risk, model, name, damping=LAMBDA, **settings)
    H = np.asarray(_dense(factored))
    places = [np.asarray(m).ravel() for m in factored.split(jnp.arange(float(len(H))))]
    return [H[np.ix_(p.astype(int), p.astype(int))] for p in places]


def terms(problem, subject) -> dict[str, float]:
    problem = subject.seen(problem)
    risk, model = library.risk_of(problem), library.model_at(problem.family, problem.theta)
    settings = {"damping": problem.damping, "tolerance": TOLERANCE}
    found = {}
    for block in subject.factor(risk, model, "ekfac", **settings).blocks:
        if block.terms is None:
            continue
        s, t = (np.asarray(x)[0] for x in block.scales)
        weigh = lambda R, s=s, t=t: s[:, None] * R * t[None, :]
        R = 1 / (np.asarray(block.values)[0] + problem.damping)
        p, q = (np.asarray(x)[0] for x in block.terms)
        left_out = np.linalg.norm(weigh(R - p.T @ q))
        found[f"terms {block.layer.paths[0]}"] = above(
            left_out, TOLERANCE * np.linalg.norm(weigh(R)), slack=1e-4
        )
        fewer = np.linalg.svd(weigh(R), compute_uv=False)[len(p) - 1 :]
        if len(p) > 1:
            found[f"no fewer {block.layer.paths[0]}"] = above(
                TOLERANCE * np.linalg.norm(weigh(R)), np.linalg.norm(fewer), slack=1e-4
            )
    return found


def changed(change, only: str | None = None):
    """The library's curvature with every block changed."""

    def factor(risk, model, name, **settings):
        factored = library_curvature(risk, model, name, **settings)
        if only not in (None, name):
            return factored
        blocks = tuple(change(block) for block in factored.blocks)
        return eqx.tree_at(lambda f: f.blocks, factored, blocks)

    return Subject(factor)


def _swap(where, fn):
    return lambda block: eqx.tree_at(where, block, fn(where(block)), is_leaf=lambda x: x is None)


def settings_changed(**other):
    return Subject(lambda r, m, name, **s: library_curvature(r, m, name, **{**s, **other}))


def _weaker_terms(block):
    return (
        block
        if block.terms is None
        else _swap(lambda b: b.terms[0], lambda p: p.at[:, 0].mul(1.3))(block)
    )


MUTANTS = {
    "right eigenvectors transposed": changed(_swap(lambda b: b.right, lambda q: q.swapaxes(1, 2))),
    "left eigenvectors transposed": changed(_swap(lambda b: b.left, lambda q: q.swapaxes(1, 2))),
    "bias column first": changed(_swap(lambda b: b.right, lambda q: jnp.roll(q, 1, axis=1))),
    "damped twice": changed(_swap(lambda b: b.damping, lambda d: 2 * d)),
    "eigenvalues scrambled": changed(_swap(lambda b: b.values, lambda v: v[:, ::-1, ::-1])),
    "eigenvalues divided by n": changed(_swap(lambda b: b.values, lambda v: v / 10)),
    "K-FAC for EK-FAC": Subject(lambda r, m, name, **s: library_curvature(r, m, "kfac", **s)),
    "empirical for exact": settings_changed(fisher="empirical"),
    "one sampled label for all": settings_changed(fisher="sampled", key=jr.key(0)),
    "weights ignored": replace(SUBJECT, seen=mutants.unweighted),
    "Ω left out": replace(SUBJECT, seen=lambda p: replace(p, l2=0 * p.l2)),
    "reduce for expand": settings_changed(sharing="reduce"),
    "expand for reduce": settings_changed(sharing="expand"),
    "a term too large": changed(_weaker_terms),
    "a tolerance ten times too large": settings_changed(tolerance=0.99),
}  # fmt: skip

STRATEGY = problems(SOFTMAX, BINARY, NETWORK, SQUARED_NETWORK)

register(Proposition("P13", "Kronecker exactness", STRATEGY, check, SUBJECT, MUTANTS))
