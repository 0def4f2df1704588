"""P13. Where K-FAC and EK-FAC are exact, and how near they are elsewhere.

STATEMENT
    A layer z_t = W a_t (the bias a column of W), places t where W is shared, g_tr = ∂/∂z_t of the r-th
    row of a square root of the loss's Fisher in output space. The layer's block of the Fisher matrix is
        F = (1/n) Σᵢ wᵢ Σ_r vec(Σ_t g_tr a_tᵀ) vec(·)ᵀ;
    K-FAC's is G⊗A with G = (1/n) Σ wᵢ Σ_tr g gᵀ, A = (1/(w̄T)) Σ wᵢ Σ_t a aᵀ, w̄ = Σ wᵢ. All undamped.
    (a) One datum, no sharing: G⊗A = F for any layer and loss. So EK-FAC is exact too.
    (b) A network of linear layers only, each applied once an example, squared error, any data: G⊗A = F
        for every layer.
    (c) Shared places: where each place has an output and a squared error of its own (or the layer is
        called twice, on two inputs), "expand" is exact for a linear layer; where outputs are averaged
        over places, "reduce" is exact. The other of the two is not.
    (c') One W of l by r used as W a and as Wᵀ b, an output of each, squared error: EK-FAC is exact;
        K-FAC has F's partial traces, and is exact where the second moments of a, or of b, are a multiple
        of I.
    (d) EK-FAC, Q diag(Λ) Qᵀ with Q = Q_G⊗Q_A and Λ = diag(QᵀFQ), is the nearest to F in Frobenius norm
        of all matrices with eigenvectors Q: ‖F − EK-FAC‖ ≤ ‖F − K-FAC‖; its trace is F's.
    (e) The terms p, q that stand for R = 1/(Λ + l2 + λ) leave out at most the share `tolerance`:
            ‖diag(s)(R − Σ_ρ p⊗q)diag(t)‖ ≤ tolerance · ‖diag(s) R diag(t)‖  in Frobenius norm,
        s and t the factors' eigenvalues, and no fewer do (of a multiple of four: none by four).
    (f) The coordinates c of the eigenbasis that are kept leave out at most the share `tolerance`:
            Σ_{c left out} (Λ_c R_c)² ≤ tolerance² Σ_c (Λ_c R_c)²,
        and less than half of them do not (a half, a third, a sixth … of all are kept, or all). If
        the coordinates of two gradients v, v' are uncorrelated, of mean squares Λ_c and independent of
        one another, it is the mean square of the error of vᵀRv' over that of vᵀRv'.
    (g) Uncorrelated in fourth order: where no place is shared and every entry of aaᵀ is uncorrelated,
        over the weighted data, with every entry of Σ_r g_r g_rᵀ, G⊗A = F.
    (h) The Gauss–Newton matrix is the Hessian where outputs are affine in the parameters, and where the
        loss's gradient at every output is 0.

ASSUMPTIONS
    The same Fisher in F and in the factors. (d), (e), (f) need nothing else, but what they state.

PROOF
    (a) The sum over i has one term: F = (w/n) Σ_r g_r g_rᵀ ⊗ a aᵀ, and G = (w/n) Σ g gᵀ, A = a aᵀ.
    (b) ∂output/∂z = B does not depend on i, the root of the Fisher is I, so the rows of B are g_r:
        F = (1/n) Σ wᵢ BᵀB ⊗ aᵢaᵢᵀ = (w̄/n) BᵀB ⊗ (1/w̄) Σ wᵢaᵢaᵢᵀ, which are G and A.
    (c) Own errors: the rows r are pairs (place, output), g_tr = e_k where r = (t, k), else 0. So
        F = (1/n) Σ wᵢ Σ_t I⊗a_t a_tᵀ = G⊗A since G = (w̄T/n) I. Two calls are two places. Averages: the
        output is W ā, ā the mean of a_t, so F = (w̄/n) I⊗(1/w̄)Σ wᵢ āāᵀ; "reduce" sums g_t = e_k/T to e_k
        and takes ā. "Expand" has Σ a_t a_tᵀ/T ≠ āāᵀ there, unless all a_t are equal.
    (c') The gradients in W are e_k aᵀ and b e_kᵀ, and no row has both: F = I⊗M_a + M_b⊗I, M the second
        moments (1/n) Σ wᵢ aaᵀ. Of the two pairs (I, M_a), (M_b, I), K-FAC takes the product with the
        partial traces of the sum, G ∝ tr(M_a) I + r M_b and A ∝ l M_a + tr(M_b) I for W of l by r. Their
        eigenvectors are those of M_b and M_a, in which F is diagonal. Two products with one factor in
        common, up to a multiple, have a product as their sum, and it is the one with its traces.
    (d) ‖F − Q D Qᵀ‖² = ‖QᵀFQ − D‖² is a sum of squares over entries; D touches the diagonal only, and is
        best where it equals it. K-FAC is Q D Qᵀ with D its own eigenvalues. tr Q diag(Λ) Qᵀ = tr F.
    (e) Eckart–Young–Mirsky for the weighted matrix; the rank is the least whose tail is small enough.
    (f) E (Σ_c R_c v_c v'_c)² = Σ_cd R_c R_d E[v_c v_d] E[v'_c v'_d] = Σ_c R_c² Λ_c², for any part of the
        sum. Of all sets of as many coordinates the one with the largest terms leaves out the least.
    (g) With the mean E over data of weights w/Σw, F = (Σw/n) E[Σ_r g_r g_rᵀ ⊗ aaᵀ], which is then
        (Σw/n) E[Σ_r g_r g_rᵀ] ⊗ E[aaᵀ] = G⊗A.
    (h) ∇²ℓᵢ = AᵢᵀSᵢAᵢ + Σ_k rᵢₖ ∇²outputᵢₖ, A the outputs' Jacobian, r and S the loss's gradient and
        Hessian in them: the last sum has a factor 0 in every term. ∎

CHECK
    The library's operators as dense matrices, against F from Jacobians in NumPy. (a)–(c') to rounding,
    with λ = 0.02, far below the median of the spectrum, and one l2 a layer. With an l2 of each leaf's
    own EK-FAC is that of NumPy: l2 enters by its diagonal in the eigenbasis.

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
import scipy.linalg as sl

import influx as ix
from influx._curvature.truncated import truncated

from . import _kronecker as kronecker
from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, apart, gap
from ._problems import BINARY, NETWORK, SOFTMAX, SQUARED_NETWORK, draw, problems
from ._registry import Proposition, register

LAMBDA, TOLERANCE, COARSE = 0.02, 0.1, 0.3


def library_curvature(risk, model, name: str, **settings):
    return {"kfac": ix.KFAC, "ekfac": ix.EKFAC}[name](**settings).factor(risk, model)


def library_gauss_newton(problem, curvature=ix.GaussNewton) -> np.ndarray:
    return np.asarray(library.handle(problem, curvature).response.factored.matrix)


@dataclass(frozen=True)
class Subject:
    """`factor(risk, model, name, **settings)` answers the factored curvature, `truncate(block,
    penalties, tolerance)` a block with the coordinates it keeps, `gauss_newton(problem)` H + λI."""

    factor: Callable
    seen: Callable = lambda problem: problem
    truncate: Callable = truncated
    gauss_newton: Callable = library_gauss_newton


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
        **uncorrelated(problem, subject),
        **gauss_newton(problem, subject),
        **terms(problem, subject),
        **coordinates(problem, subject),
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
        "nearer": above(distance["ekfac"], distance["kfac"], size=np.linalg.norm(F)),
        "trace": gap(np.trace(got["ekfac"]), np.trace(F)),
        "l2 by leaf": gap(uneven - damped, kronecker.ekfac(problem)),
    }


def gauss_newton(problem, subject) -> dict[str, float]:
    """(h): a softmax of affine logits, and a network that fits its targets."""
    affine = draw(SOFTMAX, problem.seed, problem.damping, True)
    network = draw(SQUARED_NETWORK, problem.seed, problem.damping, True)
    fitted = replace(network, y=oracle.outputs(network.family, network.theta, network.X))
    return {
        f"Gauss–Newton, {name}": gap(subject.gauss_newton(p), oracle.curvature(p))
        for name, p in {"affine": affine, "no residual": fitted}.items()
    }


class Gain(eqx.Module):
    """A linear layer whose outputs are multiplied by numbers of the example's own."""

    layer: eqx.nn.Linear

    def __call__(self, x):
        return self.layer(x[:3]) * x[3:]


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


class Steps(eqx.Module):
    """The layer in a scan."""

    layer: eqx.nn.Linear

    def __call__(self, x):
        return jax.lax.scan(lambda carry, row: (carry, self.layer(row)), None, x)[1]


class Vocabulary(eqx.Module):
    table: eqx.nn.Embedding

    def __call__(self, ids):
        return jax.vmap(self.table)(ids)


class BothWays(eqx.Module):
    """A matrix and its transpose, on two inputs."""

    weight: jax.Array

    def __call__(self, x):
        return jnp.concatenate([self.weight @ x[:3], self.weight.T @ x[3:]])


@cache
def models(kind: str):
    a, b = jr.split(jr.key(3))
    layer = eqx.nn.Linear(3, 2, key=a)
    made = {
        "stack": Stack(layer, eqx.nn.Linear(2, 2, key=b)),
        "own": Places(layer, False),
        "mean": Places(layer, True),
        "twice": Twice(layer),
        "scan": Steps(layer),
        "convolution": eqx.nn.Conv1d(2, 2, 3, key=a),
        "look-up": Vocabulary(eqx.nn.Embedding(TOKENS, 2, key=a)),
        "both ways": BothWays(layer.weight),
        "gain": Gain(layer),
    }
    return made[kind]


TOKENS = 5


def _regression(problem, inputs: tuple[int, ...], outputs: tuple[int, ...], whole: bool = False):
    """Data of the problem's seed and weights, for the models of this module; `whole`: of tokens."""
    rng = np.random.default_rng(problem.seed)
    shape = (problem.n, *inputs)
    X = rng.integers(0, TOKENS, shape) if whole else rng.normal(size=shape) + 0.4
    y = rng.normal(size=(problem.n, *outputs))
    return X, _risk(problem, X, y)


def _risk(problem, X, y):
    data, weights = (jnp.asarray(X), jnp.asarray(y)), jnp.asarray(problem.w)
    return ix.EmpiricalRisk(data, ix.SquaredError(), l2=problem.l2[0], weights=weights)


def _one(a: np.ndarray) -> np.ndarray:
    return np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)


def linear_network(problem, subject) -> dict[str, float]:
    seen = subject.seen(problem)
    X, risk = _regression(seen, (3,), (2,))
    model, w = models("stack"), problem.w
    W1, b1 = (np.asarray(x) for x in (model.first.weight, model.first.bias))
    B = np.asarray(model.last.weight)
    parts = [(B.T @ B, _one(X)), (np.eye(2), _one(X @ W1.T + b1))]
    truth = [np.kron(G, np.einsum("n,ni,nj->ij", w / problem.n, h, h)) for G, h in parts]
    return {
        f"linear network {name}": _blocks_gap(subject, risk, model, name, truth, problem)
        for name in ("kfac", "ekfac")
    }


def _windows(X: np.ndarray) -> np.ndarray:
    """[n, channels, length] ↦ [n, places, channels × 3]."""
    windows = np.lib.stride_tricks.sliding_window_view(X, 3, axis=2)
    return windows.swapaxes(1, 2).reshape(len(X), windows.shape[2], -1)


# kind: inputs, outputs, the activations a_t [n, T, r], and the setting that is exact.
SHARED = {
    "own": ((4, 3), (4, 2), _one, "expand"),
    "twice": ((2, 3), (2, 2), _one, "expand"),
    "scan": ((4, 3), (4, 2), _one, "expand"),
    "convolution": ((2, 6), (2, 4), lambda X: _one(_windows(X)), "expand"),
    "look-up": ((4,), (4, 2), lambda ids: np.eye(TOKENS)[ids], "expand"),
    "mean": ((4, 3), (2,), lambda X: _one(X.mean(axis=1, keepdims=True)), "reduce"),
}


def sharing(problem, subject) -> dict[str, float]:
    found = {}
    for kind, (inputs, outputs, activations, exact) in SHARED.items():
        X, risk = _regression(subject.seen(problem), inputs, outputs, kind == "look-up")
        a = activations(X)
        truth = np.einsum("n,nti,ntj->ij", problem.w / problem.n, a, a)
        want = _with_penalty(np.kron(np.eye(2), truth), problem)
        args = subject, risk, models(kind), "kfac"
        found[f"{kind}: {exact}"] = gap(_blocks(*args, sharing=exact)[0], want)
        if kind == "mean":
            expanded = _blocks(*args, sharing="expand")[0]
            found["mean: expand is not exact"] = apart(expanded, want, least=1e-3)
    return {**found, **both_ways(problem, subject)}


def uncorrelated(problem, subject) -> dict[str, float]:
    """(g), with F = (1/n) Σ wᵢ diag(sᵢ²)⊗aᵢaᵢᵀ in NumPy: every input a meets every gain s."""
    rng = np.random.default_rng(problem.seed)
    inputs, gains = rng.normal(size=(4, 3)) + 0.4, ((0.5, -1.0), (1.0, 2.0), (-2.0, 0.3))
    X = np.array([[*a, *s] for a in inputs for s in gains])
    product = np.outer(rng.uniform(0.5, 2.0, 4), rng.uniform(0.5, 2.0, 3))
    together = product * (1 + 9 * np.eye(4, 3))
    model, a = models("gain"), _one(X[:, :3])
    found = {}
    for name, table in {"uncorrelated": product, "correlated": together}.items():
        w = table.ravel()
        risk = _risk(subject.seen(replace(problem, X=X, w=w)), X, np.zeros((len(X), 2)))
        got = _blocks(subject, risk, model, "kfac")[0]
        each = np.einsum("n,nk,ni,nj->kij", w / len(X), np.square(X[:, 3:]), a, a)
        want = _with_penalty(sl.block_diag(*each), problem)
        exact = name == "uncorrelated"
        found[name] = gap(got, want) if exact else apart(got, want, least=1e-3)
    return found


def both_ways(problem, subject) -> dict[str, float]:
    """(c'), with F = I⊗M_a + M_b⊗I in NumPy."""
    seen, model, share = subject.seen(problem), models("both ways"), problem.w / problem.n
    X, risk = _regression(seen, (5,), (5,))
    moment = lambda x: np.einsum("n,ni,nj->ij", share, x, x)
    sum_of = lambda X: np.kron(np.eye(2), moment(X[:, :3])) + np.kron(moment(X[:, 3:]), np.eye(3))
    F, penalty = sum_of(X), _with_penalty(np.zeros((6, 6)), problem)
    kfac, ekfac = (_blocks(subject, risk, model, name)[0] - penalty for name in ("kfac", "ekfac"))
    round_a = np.linalg.cholesky(np.linalg.inv(moment(X[:, :3])))  # then M_a is I
    isotropic = np.concatenate([X[:, :3] @ round_a, X[:, 3:]], axis=1)
    round_risk = _risk(seen, isotropic, np.zeros((problem.n, 5)))
    round_kfac = _blocks(subject, round_risk, model, "kfac")[0] - penalty
    return {
        "both ways: EK-FAC": gap(ekfac, F),
        "both ways: partial traces": max(
            gap(trace(kfac), trace(F)) for trace in (_over_left, _over_right)
        ),
        "both ways: isotropic": gap(round_kfac, sum_of(isotropic)),
    }


def _over_left(block: np.ndarray) -> np.ndarray:
    return np.einsum("kikj->ij", block.reshape(2, 3, 2, 3))


def _over_right(block: np.ndarray) -> np.ndarray:
    return np.einsum("ikjk->ij", block.reshape(2, 3, 2, 3))


def _blocks_gap(subject, risk, model, name, truth, problem) -> float:
    got = _blocks(subject, risk, model, name)
    return max(gap(a, _with_penalty(b, problem)) for a, b in zip(got, truth))


def _with_penalty(block: np.ndarray, problem) -> np.ndarray:
    return block + (problem.l2[0] + LAMBDA) * np.eye(len(block))


def _blocks(subject, risk, model, name, **settings) -> list[np.ndarray]:
    """Each layer's block, by rows of [W, b], the columns of a row as the parameters count them."""
    factored = subject.factor(risk, model, name, damping=LAMBDA, **settings)
    H = np.asarray(_dense(factored))
    places = [np.sort(m, axis=-1).ravel() for m in factored.split(jnp.arange(float(len(H))))]
    return [H[np.ix_(p.astype(int), p.astype(int))] for p in places]


def terms(problem, subject) -> dict[str, float]:
    problem = subject.seen(problem)
    risk, model = library.risk_of(problem), library.model_at(problem.family, problem.theta)
    settings = {"damping": problem.damping, "tolerance": TOLERANCE}
    found = {}
    for block in subject.factor(risk, model, "ekfac", **settings).blocks:
        if block.terms is None:
            continue
        s, t = (np.asarray(x)[0] for x in block.factor_values)
        weigh = lambda R, s=s, t=t: s[:, None] * R * t[None, :]
        R = 1 / (np.asarray(block.values)[0] + problem.damping)
        p, q = (np.asarray(x)[0] for x in block.terms)
        left_out = np.linalg.norm(weigh(R - p.T @ q))
        found[f"terms {block.layer.paths[0]}"] = above(
            left_out, TOLERANCE * np.linalg.norm(weigh(R)), slack=1e-4
        )
        step = 1 if len(p) % 4 else 4
        fewer = np.linalg.svd(weigh(R), compute_uv=False)[len(p) - step :]
        if len(p) > step:
            found[f"no fewer {block.layer.paths[0]}"] = above(
                TOLERANCE * np.linalg.norm(weigh(R)), np.linalg.norm(fewer), slack=1e-4
            )
    return found


def coordinates(problem, subject) -> dict[str, float]:
    problem = subject.seen(problem)
    risk, model = library.risk_of(problem), library.model_at(problem.family, problem.theta)
    blocks = subject.factor(risk, model, "ekfac", damping=problem.damping).blocks
    found = {}
    for block, layer in zip(blocks, kronecker.layers(problem)):
        Q = np.kron(np.asarray(block.left)[0], np.asarray(block.right)[0])
        curved = np.diag(Q.T @ kronecker.block(problem, layer) @ Q)
        penalties = np.square(Q).T @ problem.penalty[layer.places.reshape(-1)]
        weights = np.square(curved / (curved + penalties + problem.damping))
        shaped = jnp.asarray(penalties.reshape(block.values.shape))
        kept = subject.truncate(block, shaped, COARSE).kept
        least = np.cumsum(np.sort(weights)[::-1])
        if kept is None:  # it takes more than half of them
            fewer = least[len(weights) // 2 - 1]
            found[f"more than half of {block.layer.paths[0]}"] = above(
                fewer, (1 - COARSE**2) * least[-1], slack=1e-6, size=1e-12
            )
            continue
        left_out = least[-1] - np.sum(weights[np.asarray(kept)])
        found[f"coordinates {block.layer.paths[0]}"] = above(
            left_out, COARSE**2 * least[-1], slack=1e-6, size=1e-12
        )
        fewer = (len(kept) - 1) // 2
        if fewer > 0:
            found[f"no fewer coordinates {block.layer.paths[0]}"] = above(
                COARSE**2 * least[-1],
                least[-1] - least[fewer - 1],
                slack=1e-6,
                size=1e-12,
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
    """A basis of `None`, the identity, stays."""
    change = lambda block: eqx.tree_at(where, block, fn(where(block)))
    return lambda block: block if where(block) is None else change(block)


def settings_changed(**other):
    return Subject(lambda r, m, name, **s: library_curvature(r, m, name, **{**s, **other}))


def _weaker_terms(block):
    return (
        block
        if block.terms is None
        else _swap(lambda b: b.terms[0], lambda p: p.at[:, 0].mul(1.3))(block)
    )


def _half(block, penalties, tolerance):
    block = truncated(block, penalties, tolerance)
    return block if block.kept is None else _swap(lambda b: b.kept, lambda c: c[::2])(block)


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
    "one l2 for a weight and its bias": replace(SUBJECT, seen=lambda p: replace(p, l2=_even(p))),
    "Ω left out": replace(SUBJECT, seen=lambda p: replace(p, l2=0 * p.l2)),
    "reduce for expand": settings_changed(sharing="reduce"),
    "expand for reduce": settings_changed(sharing="expand"),
    "a term too large": changed(_weaker_terms),
    "a tolerance ten times too large": settings_changed(tolerance=0.99),
    "half of the coordinates": replace(SUBJECT, truncate=_half),
    "penalty taken for data": replace(SUBJECT, truncate=lambda b, p, t: truncated(b, 0 * p, t)),
    "empirical Fisher for Gauss–Newton": replace(
        SUBJECT, gauss_newton=lambda p: library_gauss_newton(p, library.empirical_fisher)
    ),
    "a share not squared": replace(SUBJECT, truncate=lambda b, p, t: truncated(b, p, t**0.5)),
}  # fmt: skip

STRATEGY = problems(SOFTMAX, BINARY, NETWORK, SQUARED_NETWORK)

register(Proposition("P13", "Kronecker exactness", STRATEGY, check, SUBJECT, MUTANTS))
