"""P10. One Newton step without a point has its leverage exactly, and is exact if J is quadratic; its
error is O(1/n²) like first order's, of which it leaves out the part due to ∇²J.

STATEMENT
    Let J₋ᵢ = J − (wᵢ/n)ℓᵢ and H₋ᵢ = ∇²J₋ᵢ(θ̂) = H − (wᵢ/n)∇²ℓᵢ ≻ 0, and Δθᵢ = −H₋ᵢ⁻¹∇J₋ᵢ(θ̂).
    (a) At a stationary point Δθᵢ = (wᵢ/n) H₋ᵢ⁻¹gᵢ. Anywhere, with ∇ℓᵢ = Aᵢᵀrᵢ, ∇²ℓᵢ = AᵢᵀSᵢAᵢ
        (outputs affine in θ) and δ₀ = −H⁻¹∇J(θ̂),
            Δθᵢ = δ₀ + (wᵢ/n) H⁻¹Aᵢᵀ (I − (wᵢ/n) SᵢAᵢH⁻¹Aᵢᵀ)⁻¹ (rᵢ + SᵢAᵢδ₀).
    (b) If J₋ᵢ is quadratic, θ̂ + Δθᵢ = θ̂₋ᵢ. For scalar squared loss and m linear in θ,
            m(θ̂₋ᵢ) − m(θ̂) = −wᵢ I(i; m)/(n (1 − hᵢ)),   hᵢ = (wᵢ/n) aᵢᵀH⁻¹aᵢ < 1 the leverage, aᵢ
            = ∂outputᵢ/∂θ.
    (c) If ∇²J₋ᵢ is L-Lipschitz on the segment between θ̂ and θ̂₋ᵢ, ‖θ̂ + Δθᵢ − θ̂₋ᵢ‖ ≤ (L/2)
        ‖H₋ᵢ⁻¹‖ ‖θ̂ − θ̂₋ᵢ‖².
    (d) The predicted effect is m(θ̂ + Δθᵢ) − m(θ̂ + δ₀), m evaluated, not linearised. Off a
        stationary point it is thus a difference of two Newton steps: a point of weight 0 has
        effect exactly 0, where m(θ̂ + Δθᵢ) − m(θ̂) would count m(θ̂ + δ₀) − m(θ̂), "finishing
        training", as an effect of removal.
    (e) Chord steps θᵏ⁺¹ = θᵏ − H⁻¹∇J₋ᵢ(θᵏ), H fixed. Where (1 − ρ)H ⪯ ∇²J₋ᵢ ⪯ (1 + ρ)H on the segments
        from θᵏ to θ̂₋ᵢ and to θᵏ⁺¹,
            ‖θᵏ⁺¹ − θ̂₋ᵢ‖_H ≤ ρ ‖θᵏ − θ̂₋ᵢ‖_H,    ‖∇J₋ᵢ(θᵏ⁺¹)‖_H⁻¹ ≤ ρ ‖∇J₋ᵢ(θᵏ)‖_H⁻¹:
        for ρ < 1 they tend to θ̂₋ᵢ, any H + λI ≻ 0 in H's place, and along each the second, Newton's
        decrement, falls; along the Newton step that comes first it may rise. The same of
        J₋ᵢ − (1 − 1/s)Ω, which is J₋ᵢ with the other weights multiplied by s = W/(W − wᵢ), W = Σw, over
        s: the mean over the others. So the value of point i, (n/wᵢ)[L_V(θᵏ) − L_V(θ̂)], tends to that of
        retraining without it, in either convention.
    In (a)–(d), with a damping λ, H + λI and H₋ᵢ + λI stand for H and H₋ᵢ, and retraining means that of
    J₋ᵢ + (λ/2)‖· − θ̂‖².

ASSUMPTIONS
    As stated; in (b) and (c) the removed problem has a minimiser θ̂₋ᵢ with ∇J₋ᵢ(θ̂₋ᵢ) = 0.

PROOF
    (a) At a stationary point ∇J₋ᵢ(θ̂) = −(wᵢ/n)gᵢ. In general write t = wᵢ/n, U = Aᵢᵀ. Woodbury's
        identity is (H − tUSUᵀ)⁻¹ = H⁻¹ + tH⁻¹U (I − tSUᵀH⁻¹U)⁻¹ SUᵀH⁻¹ (multiply by H − tUSUᵀ to
        verify). Apply it to −∇J₋ᵢ = −∇J + tUr: with K = UᵀH⁻¹U, M = (I − tSK)⁻¹ and H⁻¹(−∇J + tUr)
        = δ₀ + tH⁻¹Ur,
            Δθᵢ = δ₀ + tH⁻¹Ur + tH⁻¹U M S(Uᵀδ₀ + tKr) = δ₀ + tH⁻¹U [r + M tSKr + M SUᵀδ₀].
        M tSK = M (I − (I − tSK)) = M − I, so the bracket is M(r + SUᵀδ₀).
    (b) For quadratic J₋ᵢ, ∇J₋ᵢ(θ) = ∇J₋ᵢ(θ̂) + H₋ᵢ(θ − θ̂) everywhere, and its zero is θ̂ + Δθᵢ.
        With S = 1, δ₀ = 0, U = aᵢ: M = 1/(1 − hᵢ) and gᵢ = aᵢrᵢ, so Δθᵢ = (wᵢ/n)H⁻¹gᵢ/(1 − hᵢ);
        apply ∇mᵀ, and ∇mᵀH⁻¹gᵢ = −I(i; m). hᵢ < 1 since H₋ᵢ ≻ 0: 0 < det H₋ᵢ/det H = 1 − hᵢ.
    (c) Put f = J₋ᵢ, θ* = θ̂₋ᵢ, ∇f(θ*) = 0. Then θ̂ + Δθᵢ − θ* = H₋ᵢ⁻¹[H₋ᵢ(θ̂ − θ*) − (∇f(θ̂) −
        ∇f(θ*))] = H₋ᵢ⁻¹ ∫₀¹ [∇²f(θ̂) − ∇²f(θ* + s(θ̂ − θ*))] (θ̂ − θ*) ds. The integrand's norm is
        at most L(1 − s)‖θ̂ − θ*‖², whose integral is (L/2)‖θ̂ − θ*‖².
    (d) For wᵢ = 0, J₋ᵢ = J and Δθᵢ = δ₀.
    (e) With M the mean of ∇²J₋ᵢ on a segment from θᵏ to θ̂₋ᵢ, ∇J₋ᵢ(θᵏ) = M(θᵏ − θ̂₋ᵢ), so θᵏ⁺¹ − θ̂₋ᵢ =
        (I − H⁻¹M)(θᵏ − θ̂₋ᵢ); in the coordinates H^½θ the factor is I − H^(−½)MH^(−½), symmetric, with
        eigenvalues in [−ρ, ρ]. With M of the segment from θᵏ to θᵏ⁺¹, ∇J₋ᵢ(θᵏ⁺¹) = ∇J₋ᵢ(θᵏ) +
        M(θᵏ⁺¹ − θᵏ) = (I − MH⁻¹)∇J₋ᵢ(θᵏ); H^(−½) of it has the same factor. ∎

    L for outputs affine in θ: (1/n) Σ_{j≠i} wⱼ t ‖x̃ⱼ‖³, t the bound on the loss' third derivative
    in output space (softmax √(2/27), sigmoid 1/(6√3), squared error 0: proofs in P11).

CHECK
    Steps and effects of the library against NumPy solves with H₋ᵢ, at θ̂ and off it; against own
    retraining, exactly (quadratic J) or within (c); and nearer to retraining, summed over points,
    than first order. Values after 0 and 2 chord steps against own ones, at θ̂ and off it, after 300
    against retraining; own chord steps against both inequalities of (e).

SOURCE
    D. Pregibon, "Logistic regression diagnostics" (1981); R. D. Cook, S. Weisberg (1982), for
    leverage; A. Beirami, M. Razaviyayn, S. Shahrampour, V. Tarokh, "On optimal generalizability in
    parametric learning", arXiv:1711.05323.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, gap
from ._problems import LINEAR, NETWORK, SCALAR, problems
from ._registry import Proposition, register

THIRD = {"softmax": np.sqrt(2 / 27), "binary": 1 / (6 * np.sqrt(3)), "squared": 0.0}


@dataclass(frozen=True)
class Subject:
    """Predicted effects of removal on the queries' loss [m, n], and on vᵀθ [k, n]; values after some
    chord steps, erased and renormalised, [2, n]."""

    loss: Callable
    linear: Callable
    value: Callable


def refined(problem, refine: int) -> np.ndarray:
    return library.value(problem, refine=refine)


SUBJECT = Subject(library.newton, library.steps, refined)


def newton_steps(problem) -> tuple[np.ndarray, np.ndarray]:
    """Δθᵢ for every i [n, P], and δ₀, by solves with H₋ᵢ + λI."""
    theta, eye = problem.theta, problem.damping * np.eye(problem.theta.size)

    def step(w):
        H = oracle.hessian(problem, theta, w) + eye
        return -np.linalg.solve(H, oracle.gradient(problem, theta, w))

    without = [step(np.where(np.arange(problem.n) == i, 0.0, problem.w)) for i in range(problem.n)]
    return np.array(without), step(problem.w)


def check(problem, subject) -> dict[str, float]:
    errors = formula(problem, subject, "at θ̂")
    if len(problem.family.sizes) == 2:
        errors |= formula(mutants.elsewhere(problem), subject, "off θ̂")
        errors |= retraining(problem, subject)
        errors |= chords(problem, subject)
    if problem.family.sizes[-1] == 1 and problem.family.loss == "squared":
        errors |= leverage(problem, subject)
    return errors


def formula(problem, subject, where: str) -> dict[str, float]:
    steps, settle = newton_steps(problem)
    at = lambda step: oracle.measurement(problem, "loss", problem.theta + step)
    effects = np.stack([at(step) for step in steps], axis=1) - at(settle)[:, None]
    return {
        f"step {where}": gap(subject.linear(problem, np.eye(settle.size)), (steps - settle).T),
        f"effect {where}": gap(subject.loss(problem), effects),
    }


def leverage(problem, subject) -> dict[str, float]:
    A = oracle.jacobians(problem.family, problem.theta, problem.X)[:, 0]
    h = (
        problem.w
        / problem.n
        * np.einsum("np,pn->n", A, np.linalg.solve(oracle.curvature(problem), A.T))
    )
    v = np.random.default_rng(problem.seed).normal(size=(2, problem.theta.size))
    g = oracle.gradients(problem, problem.theta)
    influence = -v @ np.linalg.solve(oracle.curvature(problem), g.T)
    want = -problem.w * influence / (problem.n * (1 - h))
    return {
        "leverage": gap(subject.linear(problem, v), want),
        "h < 1": 0.0 if np.all(h < 1) else np.inf,
    }


def retraining(problem, subject) -> dict[str, float]:
    """Against own retraining of convex problems: exact, or within (c), and nearer than first order: what
    is seen of these families, not what (a)–(d) prove."""
    theta, n = problem.theta, problem.n
    steps = subject.linear(problem, np.eye(theta.size)).T
    truth = np.array(
        [oracle.minimise(problem, without(problem, i), centre=theta) for i in range(n)]
    )
    missed = np.linalg.norm(theta + steps - truth, axis=1)
    if problem.family.loss == "squared":
        return {"exact": gap(theta + steps, truth, rtol=1e-9)}
    bound = [reach(problem, i) * np.sum((theta - truth[i]) ** 2) / 2 for i in range(n)]
    moved = np.stack([oracle.measurement(problem, "loss", t) for t in truth], axis=1)
    moved = moved - oracle.measurement(problem, "loss", theta)[:, None]
    first = -oracle.influence(problem) * problem.w / n
    return {
        "Newton bound": above(missed, bound, slack=1e-9),
        "nearer than first order": above(
            np.abs(subject.loss(problem) - moved).sum(), np.abs(first - moved).sum()
        ),
    }


def chords(problem, subject) -> dict[str, float]:
    """Of points that are all trained on, since one of weight 0 has no removal; at θ̂ and off it."""
    p = replace(problem, w=np.where(problem.w > 0, problem.w, 0.7))
    p = replace(p, theta=oracle.minimise(p))
    rest = [[grown(p, i, renormalise) for i in range(p.n)] for renormalise in (False, True)]
    loss = lambda theta: oracle.measurement(p, "loss", theta).mean()

    def worth(thetas, before):
        return p.n / p.w * np.array([[loss(t) - loss(before) for t in row] for row in thetas])

    errors = {}
    for where, q in (("at θ̂", p), ("off θ̂", mutants.elsewhere(p))):
        for refine in (0, 2):
            paths = [[path(q, i, w, refine) for i, w in enumerate(row)] for row in rest]
            own = worth([[along[-1] for along in row] for row in paths], settled(q, refine))
            name = f"value {where} after {refine} chord steps"
            errors[name] = gap(subject.value(q, refine), own, rtol=1e-7, atol=1e-10)
        errors |= contraction(q, rest, paths, where)
    truth = worth([[oracle.minimise(p, w, start=p.theta) for w in row] for row in rest], p.theta)
    errors["value in the limit"] = gap(subject.value(p, 300), truth, rtol=1e-5, atol=1e-8)
    return errors


def grown(problem, i: int, renormalise: bool) -> np.ndarray:
    w = without(problem, i)
    return w * problem.w.sum() / w.sum() if renormalise else w


def metric(problem) -> np.ndarray:
    """H + λI."""
    return oracle.hessian(problem, problem.theta) + problem.damping * np.eye(problem.theta.size)


def step(problem, w) -> np.ndarray:
    """A Newton step on J(·, w), damped."""
    H = oracle.hessian(problem, problem.theta, w) + problem.damping * np.eye(problem.theta.size)
    return -np.linalg.solve(H, oracle.gradient(problem, problem.theta, w))


def onward(problem, theta, w, refine: int, growth: float = 1.0) -> list[np.ndarray]:
    H, path = metric(problem), [theta]
    for _ in range(refine):
        slope = oracle.gradient(problem, path[-1], w) / growth
        path.append(path[-1] - np.linalg.solve(H, slope))
    return path


def settled(problem, refine: int) -> np.ndarray:
    return onward(problem, problem.theta + step(problem, problem.w), problem.w, refine)[-1]


def path(problem, i: int, w: np.ndarray, refine: int) -> list[np.ndarray]:
    """From a Newton step on J₋ᵢ, and H⁻¹ times what growing weights leave of ∇Ω at θ̂ + δ₀."""
    erased = without(problem, i)
    growth = w.sum() / erased.sum()
    slope = problem.penalty * (problem.theta + step(problem, problem.w))
    drift = (1 - 1 / growth) * np.linalg.solve(metric(problem), slope)
    return onward(problem, problem.theta + step(problem, erased) + drift, w, refine, growth)


def contraction(problem, rest, paths, where: str) -> dict[str, float]:
    """Both inequalities of (e), ρ being what the mean Hessian of each segment says."""
    low, vectors = np.linalg.eigh(metric(problem))
    root, inverse = ((vectors * low**power) @ vectors.T for power in (0.5, -0.5))
    distances, slopes = [], []
    for row, ways in zip(rest, paths):
        i = problem.seed % problem.n
        w, way = row[i], ways[i]
        growth = w.sum() / without(problem, i).sum()
        end = oracle.minimise(problem, w, start=way[-1])
        norm = lambda t, end=end: np.linalg.norm(root @ (t - end))
        slope = lambda t, w=w, s=growth: np.linalg.norm(
            inverse @ oracle.gradient(problem, t, w) / s
        )
        for a, b in pairwise(way):
            to_end, to_b = (factor(problem, a, to, w, growth, inverse) for to in (end, b))
            distances.append(above(norm(b), to_end * norm(a), slack=1e-9, size=1e-3))
            slopes.append(above(slope(b), to_b * slope(a), slack=1e-9, size=1e-3))
    return {f"contraction {where}": max(distances), f"decrement {where}": max(slopes)}


NODES, SHARES = np.polynomial.legendre.leggauss(12)


def factor(problem, a, b, w, growth: float, inverse) -> float:
    """‖I − H^(−½)MH^(−½)‖₂, M the mean Hessian from a to b."""
    points = [a + 0.5 * (1 + x) * (b - a) for x in NODES]
    mean = sum(0.5 * s * oracle.hessian(problem, t, w) for s, t in zip(SHARES, points)) / growth
    return np.max(np.abs(np.linalg.eigvalsh(np.eye(a.size) - inverse @ mean @ inverse)))


def without(problem, i: int) -> np.ndarray:
    return np.where(np.arange(problem.n) == i, 0.0, problem.w)


def reach(problem, i: int) -> float:
    """L ‖(H₋ᵢ + λI)⁻¹‖ of (c)."""
    w = without(problem, i)
    norms = np.sqrt(1 + (problem.X**2).sum(axis=1))
    H = oracle.hessian(problem, problem.theta, w) + problem.damping * np.eye(problem.theta.size)
    return THIRD[problem.family.loss] * (w @ norms**3) / problem.n / np.linalg.eigvalsh(H)[0]


def finishing(problem):
    """m(θ̂ + Δθᵢ) − m(θ̂): what is left of training counted as an effect of the removal."""
    _, settle = newton_steps(problem)
    at = lambda step: oracle.measurement(problem, "loss", problem.theta + step)
    return library.newton(problem) + (at(settle) - at(0.0))[:, None]


def linearised(problem):
    return oracle.measurement_gradient(problem) @ library.steps(problem, np.eye(problem.theta.size))


def unsettled(problem, refine: int) -> np.ndarray:
    """(n/wᵢ)[L_V(θ̃ᵢ) − L_V(θ̂)] off a minimum too."""
    loss = lambda theta: oracle.measurement(problem, "loss", theta).mean()
    left = loss(settled(problem, refine)) - loss(problem.theta)
    return refined(problem, refine) + problem.n / problem.w * left


def driftless(problem, refine: int) -> np.ndarray:
    """A Newton step alone of the renormalised problem as of the erased one."""
    found = refined(problem, refine)
    return found if refine else found[[0, 0]]


def all_of(change):
    return Subject(
        *(mutants.on(change, part) for part in (SUBJECT.loss, SUBJECT.linear, SUBJECT.value))
    )


MUTANTS = {
    "sign": replace(
        SUBJECT, loss=lambda p: -SUBJECT.loss(p), linear=lambda p, v: -SUBJECT.linear(p, v)
    ),
    "leverage ignored (first order)": replace(
        SUBJECT,
        loss=lambda p: library.newton(p, "first-order"),
        linear=lambda p, v: library.steps(p, v, "first-order"),
    ),
    "finishing training counted": replace(SUBJECT, loss=finishing),
    "linearised, not evaluated": replace(SUBJECT, loss=linearised),
    "derivative, not removal": replace(SUBJECT, linear=library.linear),
    "n − 1 in place of n": replace(
        SUBJECT, linear=lambda p, v: SUBJECT.linear(p, v) * p.n / (p.n - 1)
    ),
    "weights ignored": all_of(mutants.unweighted),
    "damping dropped": all_of(mutants.undamped),
    "Ω left out of H": all_of(mutants.unpenalised_curvature),
    "a derivative for a value": replace(
        SUBJECT, value=lambda p, k: library.value(p, "first-order")
    ),
    "a Newton step alone": replace(SUBJECT, value=lambda p, k: refined(p, 0)),
    "conventions swapped": replace(SUBJECT, value=lambda p, k: refined(p, k)[::-1]),
    "a value not per weight": replace(SUBJECT, value=lambda p, k: refined(p, k) * p.w),
    "what is left of training counted": replace(SUBJECT, value=unsettled),
    "the drift left out": replace(SUBJECT, value=driftless),
    "the others' weights stay": replace(SUBJECT, value=lambda p, k: refined(p, k)[[0, 0]]),
}


def removable(problem) -> bool:
    """H₋ᵢ ≻ 0 for every i, which a network's H ≻ 0 does not imply."""
    parts = [oracle.hessian(problem, problem.theta, without(problem, i)) for i in range(problem.n)]
    return min(np.linalg.eigvalsh(part)[0] for part in parts) > 3e-3


STRATEGY = problems(*LINEAR, SCALAR, NETWORK).filter(removable)
register(Proposition("P10", "one Newton step", STRATEGY, check, SUBJECT, MUTANTS))
