"""P11. Certified removal: enclosures of what retraining without a point would give.

STATEMENT
    (a) If J₋ᵢ is μ-strongly convex and differentiable, then for *any* θ̃
            ‖θ̂₋ᵢ − θ̃‖ ≤ r := ‖∇J₋ᵢ(θ̃)‖/μ,
        and for m with a β-Lipschitz gradient m(θ̂₋ᵢ) ∈ m(θ̃) ± (‖∇m(θ̃)‖ r + ½βr²).
    (b) For hard labels, logits z affine in θ, and l2 > 0 on every parameter: μ = min l2. With A =
        ∂z/∂θ and J = ‖A‖₂ (= ‖x̃‖ for a linear layer, the bias' 1 included):
            ‖∇γ‖, ‖∇CE‖ ≤ √2 J,   ‖∇p_c‖ ≤ (√2/4) J,   β ≤ ½J² for CE, γ and every p_c.
    (c) Third derivative: |D³ logsumexp(z)[u, u, v]| ≤ √(2/27) ‖u‖²‖v‖, which is attained for
        two classes. For a sigmoid, |σ''| ≤ 1/(6√3).
    (d) Tier 2. For any Δ and θ̃ = θ̂ + Δ, t the constant of (c), no pass over the data per point:
            r ≤ (‖∇J₋ᵢ(θ̂) + H₋ᵢΔ‖ + ½ Δᵀ[(t/n) Σⱼ wⱼ‖Aⱼ‖AⱼᵀAⱼ]Δ)/μ.
        For Δ = (wᵢ/n)H₋ᵢ⁻¹gᵢ the first norm is at most ‖∇J(θ̂)‖ plus the residual of the solve,
        and for a softmax head, Δ as a matrix, the second term is at most ½ tr(ΔAΔᵀ), A = (1/n)Σ
        wⱼ‖x̃ⱼ‖x̃ⱼx̃ⱼᵀ.
    (e) The upper end of γᵢ(θ̂₋ᵢ) may be lowered to γᵢ(θ̂) where wᵢ > 0 and labels are hard. A label is
        certified where the enclosures of γᵢ(θ̂) and γᵢ(θ̂₋ᵢ) decide it.
    (f) (b) and (c) hold for smoothed labels as they are, and times the largest class weight. For K
        yes/no outputs at once ‖∇CE‖ ≤ √K J, β ≤ ¼J², |σ''| as in (c); for a loss summed over T
        positions, ‖∇CE‖ ≤ √(2T) J.
    (g) Renormalised removal, the weights of the others grown by a factor s ≥ 1: J₋ᵢ(·, sw) is min
        l2-strongly convex as well, so that (a) encloses its minimiser. (d) and (e) are about erasing.

ASSUMPTIONS
    As stated; θ̂, θ̂₋ᵢ are exact minimisers of J, J₋ᵢ. ℓ convex in z (cross-entropy is). The
    residual of the solve enters divided by μ, like the gradient.

PROOF
    (a) Strong convexity: (∇J₋ᵢ(θ̃) − ∇J₋ᵢ(θ̂₋ᵢ))ᵀ(θ̃ − θ̂₋ᵢ) ≥ μ‖θ̃ − θ̂₋ᵢ‖², and ∇J₋ᵢ(θ̂₋ᵢ) = 0.
        Cauchy–Schwarz on the left, and divide by ‖θ̃ − θ̂₋ᵢ‖. Taylor with a β-Lipschitz gradient:
        |m(θ) − m(θ̃) − ∇m(θ̃)ᵀ(θ − θ̃)| ≤ ½β‖θ − θ̃‖²; take θ = θ̂₋ᵢ.
    (b) J₋ᵢ is a sum of convex functions of affine maps and Ω, ∇²Ω = diag(l2) ≽ min l2 · I. By the
        chain rule ∇_θ m = Aᵀ∇_z m and ∇²_θ m = Aᵀ∇²_z m A, so it remains to bound in z. Let e_c be
        a unit vector. CE: ∇ = p − e_y; ‖p − e_y‖² = (1 − p_y)² + Σ_{c≠y} p_c² ≤ 2(1 − p_y)² ≤ 2,
        since a sum of squares of
            nonnegative numbers is at most the square of their sum. ∇² = diag p − ppᵀ: row c has
            the sum of absolute values p_c(1 − p_c) + p_c Σ_{k≠c}p_k = 2p_c(1 − p_c) ≤ ½, so by
            Gershgorin λ_max ≤ ½.
        γ: ∇ = e_y − q, q the softmax over c ≠ y; ‖e_y − q‖² = 1 + ‖q‖² ≤ 2. −∇² = diag q − qqᵀ,
        norm ≤ ½. p_c: ∇ = p_c(e_c − p), norm ≤ √2 p_c(1 − p_c) ≤ √2/4. ∇² = p_c(e_c − p)(e_c − p)ᵀ
        − p_c(diag p − ppᵀ),
            a difference of two positive semi-definite matrices, of norms ≤ 2p_c(1 − p_c)² ≤ 8/27
            and ≤ p_c/2: its eigenvalues lie in [−½, 8/27].
    (c) logsumexp is the log-partition function of the categorical distribution p: its derivatives
        are the cumulants. Explicitly ∂p_c/∂z in direction u is p_c(u_c − ū), ū = Σp_cu_c, so
            D logsumexp[u] = ū,   D²[u, u] = Σ p_c(u_c − ū)²,
            D³[u, u, v] = Σ p_c(v_c − v̄)(u_c − ū)² − 2Σ p_c(u_c − ū) Dū[v] = E[(u − ū)²(v − v̄)],
        the middle sum being 0 as E[u − ū] = 0. A symmetric trilinear form has its largest value on
        the unit ball at equal arguments (Banach), so that E[(u − ū)³], ‖u‖ = 1, is to be bounded.
        Hold the numbers u and their mean ū fixed: this is linear in p, and so are the constraints
        Σp_c = 1 and Σp_cu_c = ū, so a maximum stands at an extreme point, which has at most two
        classes. With weights s, 1 − s and a distance d = |u_a − u_b| ≤ √2 it is d³s(1 − s)(1 − 2s).
        The extremum of s(1 − s)(1 − 2s) solves 6s² − 6s + 1 = 0, s = ½ ± 1/(2√3), of size 1/(6√3);
        √2³/(6√3) = √(2/27). Sigmoid: σ'' = σ(1 − σ)(1 − 2σ), the same extremum.
    (d) Taylor with integral remainder: ∇J₋ᵢ(θ̂ + Δ) = ∇J₋ᵢ(θ̂) + H₋ᵢΔ + ∫₀¹ (1 − s) D³J₋ᵢ(θ̂ +
        sΔ)[Δ, Δ, ·] ds. For a unit vector v, z affine: |D³J₋ᵢ[Δ, Δ, v]| ≤ (1/n) Σ_{j≠i} wⱼ t
        ‖AⱼΔ‖²‖Aⱼv‖ ≤ (t/n) Σⱼ wⱼ ‖Aⱼ‖ ΔᵀAⱼᵀAⱼΔ, Ω contributing nothing; ∫(1 − s)ds = ½. Apply (a).
        For the special Δ: ∇J₋ᵢ(θ̂) = ∇J(θ̂) − (wᵢ/n)gᵢ and H₋ᵢΔ = (wᵢ/n)gᵢ. AⱼΔ = Δx̃ⱼ,
        Σ‖x̃ⱼ‖‖Δx̃ⱼ‖² is the trace; t < 1.
    (e) P3(c). If 0 < γᵢ(θ̂) surely and the enclosure of γᵢ(θ̂₋ᵢ) has one sign, the label's definition
        is decided; if γᵢ(θ̂) ≤ 0 surely, it is "not fitted".
    (f) A smoothed label is a distribution q: the loss logsumexp(z) − qᵀz has the derivatives of CE from
        the second on, and ∇ = p − q, where ‖p − q‖ ≤ √2 as for any two distributions (a convex function
        of both, largest at corners). A class weight multiplies the loss. Positions, and yes/no outputs,
        have separate logits: second and third derivatives are block-diagonal, so that their largest
        block bounds them (|Σ_t D³ₜ[uₜ, uₜ, vₜ]| ≤ t Σ‖uₜ‖²‖vₜ‖ ≤ t‖u‖²‖v‖), and squares of gradients
        add up.
    (g) J₋ᵢ(·, sw) is a sum of nonnegative multiples of convex functions, and Ω. ∎

CHECK
    (a) for drawn θ̃, also along the direction where (a) is an equality (softmax: the same vector
        added to
    every class, in which J₋ᵢ is exactly quadratic with curvature l2), the library's r and its error
    bound of m, for ½‖θ − θ̃‖² and for a linear m. `certify`, at θ̂ and away from it, contains own
    retraining: θ̂₋ᵢ within its radius of a Newton step taken here, margins at tiers 1 and 2, changes of
    margin and probabilities at tier 1, of loss and mean loss at tier 2; certified labels and signs are
    the true ones. (b), (c): the library's constants at random and extreme logits, against hand-written
    derivatives; those of (f), (g), and refined steps, in the project's tests.

SOURCE
    Strong convexity: Y. Nesterov, "Introductory lectures on convex optimization" (2004). C. Guo,
    T. Goldstein, A. Hannun, L. van der Maaten, "Certified data removal from machine learning
    models", arXiv:1911.03030. Tiers and constants are this project's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import influx as ix
from influx._certify.affine import affine
from influx._certify.ball import Ball
from influx._certify.enclosure import settled_radius
from influx._measurement import Loss, Margin, Probability

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above
from ._problems import BINARY, SOFTMAX, problems
from ._registry import Proposition, register

GENERALIZED, MEMORIZED, NOT_FITTED = range(3)
# Each pair is a program to compile: enough of them that every measurement and tier is met.
KINDS = {1: ("margin", "probability"), 2: ("loss", "mean")}


def certificate(problem, kind: str, tier: int) -> SimpleNamespace:
    """`certify` on own margins (kind "own"), or of changes of the queries' measurement."""
    f = library.handle(problem)
    queries = None if kind == "own" else library.queries(problem)
    if kind in ("margin", "probability"):
        f = ix.classification(f, kind)
    found = ix.certify(f, queries, tier=tier, mean=kind == "mean")
    return SimpleNamespace(
        lower=np.asarray(found.lower),
        upper=np.asarray(found.upper),
        certified=np.asarray(found.certified),
        label=None if found.label is None else np.asarray(found.label),
        radius=np.asarray(found.radius),
    )


def radius(problem) -> float:
    """The library's (a), of the problem's own weights: how far its minimiser may be from its θ."""
    return float(_settled(library.handle(problem)))


@eqx.filter_jit
def _settled(f):
    return settled_radius(affine(f))


def error(slope: float, smoothness: float, r: float) -> float:
    """How far the library says that m can be from its value at θ̃ within r of it."""
    zero, infinite = jnp.zeros(()), jnp.full((), jnp.inf)
    m = Ball(zero, jnp.asarray(slope), infinite, jnp.asarray(smoothness), zero)
    return float(m.error(jnp.asarray(r)))


def constants(family) -> dict[str, float]:
    """The library's bounds in logit space."""
    output = jax.ShapeDtypeStruct((family.sizes[-1],), float)
    loss = {"softmax": ix.SoftmaxCrossEntropy(), "binary": ix.BinaryCrossEntropy()}[family.loss]
    bounds = {"loss": Loss(), "margin": Margin(), "probability": Probability()}
    both = {name: part.bounds(loss, output) for name, part in bounds.items()}
    return {
        **{f"{name}, gradient": float(b.lipschitz) for name, b in both.items()},
        **{f"{name}, Hessian": float(b.smoothness) for name, b in both.items()},
        "loss, third": float(loss.constants(output).third),
    }


@dataclass(frozen=True)
class Subject:
    certificate: Callable
    radius: Callable
    error: Callable
    constants: Callable


SUBJECT = Subject(certificate, radius, error, constants)


def check(problem, subject) -> dict[str, float]:
    errors = {**distance(problem, subject), **sizes(problem, subject)}
    truth = retrained(problem)
    for where, at in (("at θ̂", problem), ("off θ̂", slightly_off(problem))):
        for tier in (1, 2):
            found = enclosed(at, truth, subject, tier)
            errors |= {f"{name}, tier {tier}, {where}": value for name, value in found.items()}
    return errors


def slightly_off(problem):
    """A model that training has not quite finished."""
    shift = np.random.default_rng(problem.seed).normal(size=problem.theta.size)
    return replace(problem, theta=problem.theta + 1e-3 * shift)


def without(problem, i: int) -> np.ndarray:
    return np.where(np.arange(problem.n) == i, 0.0, problem.w)


def retrained(problem):
    """θ̂ and every θ̂₋ᵢ, undamped: a certificate is about J itself."""
    each = [oracle.minimise(problem, without(problem, i)) for i in range(problem.n)]
    return problem.theta, np.array(each)


def distance(problem, subject) -> dict[str, float]:
    """(a), at θ̃ drawn freely, and along directions where it is an equality."""
    rng, i = np.random.default_rng(problem.seed), problem.seed % problem.n
    w = without(problem, i)
    truth = oracle.minimise(problem, w)
    free = rng.normal(size=(4, truth.size)) * np.array([[1e-3], [0.1], [1.0], [3.0]])
    _, vectors = np.linalg.eigh(oracle.hessian(problem, truth, w))
    far, radii = [], []
    for step in (*free, vectors[:, 0], 0.1 * vectors[:, 0]):
        far.append(np.linalg.norm(step))
        radii.append(subject.radius(replace(problem, theta=truth + step, w=w)))
    # m = ½‖θ − θ̃‖² has slope 0 and β = 1, m = uᵀ(θ − θ̃) along the way a slope of 1 and β = 0.
    bent = [subject.error(0.0, 1.0, r) for r in radii]
    straight = [subject.error(1.0, 0.0, r) for r in radii]
    return {
        "any θ̃": max(above(f, r, slack=1e-9) for f, r in zip(far, radii)),
        "any θ̃, a bent m": max(above(f**2 / 2, e, slack=1e-9) for f, e in zip(far, bent)),
        "any θ̃, a straight m": max(above(f, e, slack=1e-9) for f, e in zip(far, straight)),
    }


def enclosed(problem, truth, subject, tier: int) -> dict[str, float]:
    theta, each = truth
    own = [(problem.X[i : i + 1], problem.y[i : i + 1]) for i in range(problem.n)]
    margin = np.array([oracle.measurement(problem, "margin", theta, *z)[0] for z in own])
    margin_without = np.array(
        [oracle.measurement(problem, "margin", t, *z)[0] for t, z in zip(each, own)]
    )
    found = subject.certificate(problem, "own", tier)
    label = np.where(margin <= 0, NOT_FITTED, np.where(margin_without <= 0, MEMORIZED, GENERALIZED))
    # Enclosures are compared to a truth that is itself known to about 1e-12.
    reached = problem.theta + np.array([newton_step(problem, i) for i in range(problem.n)])
    errors = {
        "radius": above(
            np.linalg.norm(each - reached, axis=1), found.radius, slack=1e-11, size=1.0
        ),
        "own margin": inside(margin_without, found),
        "label": 0.0 if (found.label == label)[found.certified].all() else np.inf,
    }
    for kind in KINDS[tier]:
        at = lambda t, m=("loss" if kind == "mean" else kind): oracle.measurement(problem, m, t)
        change = np.stack([at(t) - at(theta) for t in each], axis=-1)
        change = change.mean(axis=0) if kind == "mean" else change
        found = subject.certificate(problem, kind, tier)
        errors[kind] = inside(change.reshape(found.lower.shape), found)
        sign = np.where(found.lower > 0, 1.0, -1.0)
        errors[f"{kind}, sign"] = above((-sign * change.reshape(sign.shape))[found.certified], 0.0)
    return errors


def newton_step(problem, i: int) -> np.ndarray:
    w = without(problem, i)
    H = oracle.hessian(problem, problem.theta, w)
    H = H + problem.damping * np.eye(problem.theta.size)
    return -np.linalg.solve(H, oracle.gradient(problem, problem.theta, w))


def inside(truth, found) -> float:
    slack = dict(slack=1e-11, size=1.0)
    return max(above(found.lower, truth, **slack), above(truth, found.upper, **slack))


def logits(problem) -> np.ndarray:
    """Random and extreme logits: nearly one-hot, two classes alone, and the sigmoid's extremum."""
    C = max(problem.family.sizes[-1], 2)
    rng = np.random.default_rng(problem.seed)
    z = [rng.normal(size=C) * scale for scale in (0.3, 1.0, 3.0, 10.0)]
    pair = np.full(C, -40.0)
    for s in (0.5, 0.5 + 0.5 / np.sqrt(3), 1 / 3, 0.999):
        z.append(
            np.where(np.arange(C) == 0, np.log(s), np.where(np.arange(C) == 1, np.log(1 - s), pair))
        )
    return np.array(z)


def sizes(problem, subject) -> dict[str, float]:
    """(b) and (c): no derivative exceeds its constant."""
    bounds, errors = subject.constants(problem.family), {}
    binary = problem.family.loss == "binary"
    push = np.array([[0.0], [1.0]]) if binary else np.eye(problem.family.sizes[-1])
    found = [derivatives(z, push, problem.seed) for z in logits(problem)]
    for name in bounds:
        errors[f"constant of {name}"] = above([f[name] for f in found], bounds[name])
    return errors


def derivatives(z: np.ndarray, push: np.ndarray, seed: int) -> dict[str, float]:
    """Norms of derivatives at class logits z, in the K outputs that `push` turns into logits."""
    C = z.size
    p, eye = oracle.softmax(z), np.eye(C)
    S = lambda q: np.diag(q) - np.outer(q, q)
    norm = lambda A: np.linalg.norm(push.T @ A @ push, 2)
    length = lambda g: np.linalg.norm(push.T @ g)
    q = [oracle.softmax(np.where(eye[y] > 0, -np.inf, z)) for y in range(C)]
    outer = lambda c: np.outer(eye[c] - p, eye[c] - p)
    # The largest D³[u, u, v] over drawn u, v, and over differences of two classes.
    u = push @ np.random.default_rng(seed).normal(size=(push.shape[1], 60))
    if push.shape[1] > 1:
        u = np.concatenate([u, (eye[:, :1] - eye[:, 1:2]) / np.sqrt(2)], axis=1)
    plain = np.linalg.lstsq(push, u, rcond=None)[0]
    unit = u / np.linalg.norm(plain, axis=0)
    centred = unit - p @ unit
    third = np.abs((centred**2 * p[:, None]).T @ centred).max()
    return {
        "loss, gradient": max(length(p - eye[y]) for y in range(C)),
        "loss, Hessian": norm(S(p)),
        "margin, gradient": max(length(eye[y] - q[y]) for y in range(C)),
        "margin, Hessian": max(norm(S(q[y])) for y in range(C)),
        "probability, gradient": max(length(p[c] * (eye[c] - p)) for c in range(C)),
        "probability, Hessian": max(norm(p[c] * (outer(c) - S(p))) for c in range(C)),
        "loss, third": third,
    }


def constant(name: str, factor: float) -> Subject:
    """One constant too small."""
    return replace(
        SUBJECT,
        constants=lambda family: {
            k: v * (factor if k == name else 1) for k, v in constants(family).items()
        },
    )


def narrowed(problem, kind, tier):
    """The predicted value with no radius."""
    found = certificate(problem, kind, tier)
    middle = (found.lower + found.upper) / 2
    return SimpleNamespace(**{**vars(found), "lower": middle, "upper": middle})


def opposite(problem, kind, tier):
    found = certificate(problem, kind, tier)
    if kind == "own":
        return found
    return SimpleNamespace(**{**vars(found), "lower": -found.upper, "upper": -found.lower})


def everything_certified(problem, kind, tier):
    """Labels and signs taken for certain wherever they are predicted."""
    found = certificate(problem, kind, tier)
    return SimpleNamespace(**{**vars(found), "certified": np.ones_like(found.certified)})


def classes_rotated(problem, kind, tier):
    found = certificate(problem, kind, tier)
    if kind != "probability":
        return found
    roll = lambda a: np.roll(a, 1, axis=1)
    return SimpleNamespace(
        **{**vars(found), "lower": roll(found.lower), "upper": roll(found.upper)}
    )


def stiffest(problem, kind, tier):
    """The radius of a μ that is the largest l2."""
    found = certificate(problem, kind, tier)
    ratio = problem.l2.min() / problem.l2.max()
    return SimpleNamespace(**{**vars(found), "radius": ratio * found.radius})


MUTANTS = {
    "μ = max l2": replace(SUBJECT, certificate=stiffest),
    "no ½βr²": replace(SUBJECT, error=lambda slope, beta, r: error(slope, 0.0, r)),
    "βr² by ¼": replace(SUBJECT, error=lambda slope, beta, r: error(slope, beta / 2, r)),
    "slope ignored": replace(SUBJECT, error=lambda slope, beta, r: error(0.0, beta, r)),
    "no radius": replace(SUBJECT, certificate=narrowed),
    "sign of the change": replace(SUBJECT, certificate=opposite),
    "certified everywhere": replace(SUBJECT, certificate=everything_certified),
    "classes rotated": replace(SUBJECT, certificate=classes_rotated),
    "weights ignored": replace(SUBJECT, certificate=mutants.on(mutants.unweighted, certificate)),
    "radius by a tenth too small": replace(SUBJECT, radius=lambda p: 0.9 * radius(p)),
    "μ of the wrong convention (½μ‖·‖² halved)": replace(SUBJECT, radius=lambda p: radius(p) / 2),
    "‖∇CE‖ ≤ 1": constant("loss, gradient", 0.7),
    "‖∇γ‖ ≤ 1": constant("margin, gradient", 0.7),
    "‖∇p‖ ≤ ¼": constant("probability, gradient", 0.7),
    "CE's β too small": constant("loss, Hessian", 0.6),
    "third derivative too small": constant("loss, third", 0.3),
}

STRATEGY = problems(SOFTMAX, BINARY)
register(Proposition("P11", "certified removal", STRATEGY, check, SUBJECT, MUTANTS))
