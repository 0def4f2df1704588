"""P12. In a softmax head influence is label agreement times feature similarity.

STATEMENT
    Logits z = Wx + b = Θh̃, h̃ = (x, 1), ε = onehot(y) − p, and vec taken class by class.
    (a) g = −ε⊗h̃ and H = (1/n) Σⱼ wⱼ (diag pⱼ − pⱼpⱼᵀ)⊗h̃ⱼh̃ⱼᵀ + diag(l2). Each output's Jacobian
        is I_C⊗h̃ᵀ.
    (b) Where the data part is S⊗A, S ⪰ 0 with null space span(1) and A ≻ 0, and there is no Ω:
            I(i; ℓ_t) = −⟨ε_i, ε_t⟩_{S⁺} ⟨h̃_i, h̃_t⟩_{A⁻¹},
        H⁻¹ read as the pseudo-inverse, the limit of (H + λI)⁻¹ as λ → 0. If all pⱼ equal one p, then
        S = diag p − ppᵀ and A = (1/n) Σ wⱼh̃ⱼh̃ⱼᵀ do it, and
            ⟨ε_i, ε_t⟩_{S⁺} = [y_i = y_t]/p_{y_i} − 1.
    (c) Two classes, l2 the same for both classes' rows: exactly, with any weights, l2 and damping,
            I(i; ℓ_t) = −2 ε_i ε_t h̃_tᵀ (2B + Λ + λI)⁻¹ h̃_i,   B = (1/n) Σ wⱼpⱼ(1 − pⱼ) h̃ⱼh̃ⱼᵀ,
        ε the first component, Λ the l2 of one row. One binary output: −ε_iε_t h̃_tᵀ(B + Λ +
        λI)⁻¹h̃_i. Points with similar features (the form positive) help where labels agree and
        harm where they do not.

ASSUMPTIONS
    Hard labels; (a), (b) and (c) are identities of the formula at any θ, stationary or not.

PROOF
    (a) ∂ℓ/∂z = p − onehot(y) = −ε and ∂²ℓ/∂z² = diag p − ppᵀ. z_c = Θ_c·h̃, so ∂z/∂θ = I_C⊗h̃ᵀ.
        Chain rule: g = (I⊗h̃)(−ε) = −ε⊗h̃, ∇²ℓ = (I⊗h̃)(diag p − ppᵀ)(I⊗h̃ᵀ) = (diag p −
        ppᵀ)⊗h̃h̃ᵀ; z is affine in θ, so no other second derivative enters.
    (b) ε·1 = 1 − 1 = 0: gradients lie in 1^⊥⊗R^d, the range of S⊗A. (S⊗A)⁺ = S⁺⊗A⁻¹, and on the
        range (S⊗A + λI)⁻¹ → (S⊗A)⁺ as λ → 0 (eigenvector by eigenvector). So I =
        −(ε_t⊗h̃_t)ᵀ(S⁺⊗A⁻¹)(ε_i⊗h̃_i), which factors. With equal p: S diag(1/p) S = (diag p −
        ppᵀ)(I − 1pᵀ) = diag p − ppᵀ = S, using pᵀ1 = 1 and so (diag p − ppᵀ)1 = 0; diag(1/p) is a
        generalised inverse of S, and for a, b in the range of S every generalised inverse gives
        the same aᵀS⁻b. With a = e_y − p, b = e_{y'} − p: Σ_c a_c b_c/p_c = [y = y']/p_y − 1 − 1 +
        Σ_c p_c = [y = y']/p_y − 1.
    (c) With two classes ε = ε₁·(1, −1) and diag p − ppᵀ = p(1 − p) D, D = [[1, −1], [−1, 1]], for
        *every* p. So H = D⊗B + I₂⊗Λ + λI. D(1, −1) = 2(1, −1): on vectors (1, −1)⊗v, H acts as (1,
        −1)⊗(2B + Λ + λI)v, and so does its inverse. g = −ε₁(1, −1)⊗h̃, and ‖(1, −1)‖² = 2. One
        output: H = B + Λ + λI, g = −εh̃. 2B + Λ + λI ≻ 0; where h̃_tᵀ(·)⁻¹h̃_i > 0 the sign of I
        is that of −ε_iε_t, and ε₁ is positive for points of the first class, negative for the
        second. ∎

CHECK
    (a) the library's Hessian, gradients and head Jacobian (its products one by one in the project's
    tests), against these formulas in NumPy; (b) at W = 0, where all p are equal, λ = 1e-9; (c) at θ̂
    with λ and l2.

SOURCE
    D. Böhning, "Multinomial logistic regression algorithm" (1992), for (a); the reading of (b) and
    (c) is this project's own; compare C.-K. Yeh et al., "Representer point selection",
    arXiv:1811.09720.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

import influx as ix
from influx._gradients import map_gradients
from influx._jacobian import output_jacobian

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, gap
from ._problems import BINARY, SOFTMAX, TWO_CLASSES, problems
from ._registry import Proposition, register


def agreement(p: np.ndarray, a: int, b: int) -> float:
    """⟨ε_a, ε_b⟩_{S⁺} where all probabilities are p."""
    return (a == b) / p[a] - 1


def at(problem):
    return library.risk_of(problem), library.model_at(problem.family, problem.theta)


def library_gradients(problem) -> np.ndarray:
    return np.asarray(map_gradients(lambda _, g: g, *at(problem)))


def library_hessian(problem) -> np.ndarray:
    return np.asarray(ix.Hessian().matrix(*at(problem)))


def library_jacobian(problem):
    return output_jacobian(*at(problem))


@dataclass(frozen=True)
class Subject:
    gradients: Callable
    hessian: Callable
    jacobian: Callable
    influence: Callable
    agreement: Callable


SUBJECT = Subject(
    library_gradients, library_hessian, library_jacobian, library.on_training, agreement
)


def by_class(problem) -> np.ndarray:
    """`order[k·d + j]`: where parameter j of class k stands in θ = (W, b)."""
    d, K = problem.family.sizes
    return np.stack([np.append(k * d + np.arange(d), K * d + k) for k in range(K)]).ravel()


def head(problem):
    """Features h̃, outputs' residuals −ε and output Hessians, of every training point."""
    family = problem.family
    z = oracle.outputs(family, problem.theta, problem.X)
    h = np.append(problem.X, np.ones((problem.n, 1)), axis=1)
    return (
        h,
        oracle.residuals(family.loss, z, problem.y),
        oracle.output_hessians(family.loss, z),
    )


def check(problem, subject) -> dict[str, float]:
    errors = {**closed_form(problem, subject), **jacobian(problem, subject)}
    if problem.family is SOFTMAX:
        return errors | kronecker(problem, subject)
    return errors | two_classes(problem, subject)


def closed_form(problem, subject) -> dict[str, float]:
    h, residual, S = head(problem)
    order = by_class(problem)
    g = np.einsum("nk,nd->nkd", residual, h).reshape(problem.n, -1)
    blocks = np.einsum("n,nkl,nd,ne->kdle", problem.w / problem.n, S, h, h)
    H = blocks.reshape(order.size, -1) + np.diag(problem.penalty[order])
    exact = oracle.hessian(problem, problem.theta)
    return {
        "gradients": gap(subject.gradients(problem)[:, order], g),
        "Hessian": gap(subject.hessian(problem)[np.ix_(order, order)], H),
        "Hessian by differentiation": gap(H, exact[np.ix_(order, order)]),
    }


def jacobian(problem, subject) -> dict[str, float]:
    """Every product of the library's Jacobian against the dense array."""
    A = oracle.jacobians(problem.family, problem.theta, problem.X)
    n, K, P = A.shape
    rng = np.random.default_rng(problem.seed)
    u, v, each = rng.normal(size=(n, K)), rng.normal(size=P), rng.normal(size=(n, P))
    M, S = rng.normal(size=(P, P)), rng.normal(size=(n, K, K))
    M, S = M + M.T, S + S.transpose(0, 2, 1)
    got = subject.jacobian(problem)
    pairs = {
        "pull": (got.pull(jnp.asarray(u)), np.einsum("nkp,nk->np", A, u)),
        "push": (got.push(jnp.asarray(v)), A @ v),
        "push_each": (got.push_each(jnp.asarray(each)), np.einsum("nkp,np->nk", A, each)),
        "gram": (got.gram(jnp.asarray(S)), np.einsum("nkp,nkl,nlq->pq", A, S, A)),
        "sandwich": (got.sandwich(jnp.asarray(M)), A @ M @ A.transpose(0, 2, 1)),
        "outer": (got.outer(), A @ A.transpose(0, 2, 1)),
        "norms": (got.norms(), np.linalg.norm(A, ord=2, axis=(1, 2))),
    }
    return {name: gap(a, b) for name, (a, b) in pairs.items()} | {
        "is a head": 0.0 if hasattr(got, "features") else np.inf
    }


def kronecker(problem, subject) -> dict[str, float]:
    """(b) where W = 0: all probabilities are softmax(b)."""
    d, C = problem.family.sizes
    theta = np.append(np.zeros(d * C), problem.theta[d * C :])
    flat = replace(problem, theta=theta, l2=0 * problem.l2, damping=1e-9)
    p = oracle.softmax(theta[d * C :])
    h, _, _ = head(flat)
    A = np.einsum("n,nd,ne->de", flat.w / flat.n, h, h)
    S = np.diag(p) - np.outer(p, p)
    epsilon = np.eye(C)[flat.y] - p
    labels = epsilon @ np.linalg.pinv(S) @ epsilon.T
    formula = np.array([[subject.agreement(p, a, b) for a in flat.y] for b in flat.y])
    similarity = h @ np.linalg.solve(A, h.T)
    return {
        "label agreement": gap(formula, labels, rtol=1e-9),
        "Kronecker": gap(subject.influence(flat), -formula * similarity, rtol=1e-5),
    }


def two_classes(problem, subject) -> dict[str, float]:
    h, residual, S = head(problem)
    d = h.shape[1] - 1
    K = problem.family.sizes[1]
    B = np.einsum("n,nd,ne->de", problem.w / problem.n * S[:, 0, 0], h, h)
    penalty = np.diag(np.repeat(problem.l2, (d, 1))) + problem.damping * np.eye(d + 1)
    similarity = K * h @ np.linalg.solve(K * B + penalty, h.T)
    epsilon = -residual[:, 0]
    got = subject.influence(problem)
    agree = np.sign(np.outer(epsilon, epsilon)) * np.sign(similarity)
    return {
        "two classes": gap(got, -np.outer(epsilon, epsilon) * similarity),
        "similar points of one label help": above(got * agree, 0.0),
    }


def transposed_blocks(problem) -> np.ndarray:
    """A⊗S in place of S⊗A."""
    d = problem.family.sizes[0] + 1
    K = problem.family.sizes[1]
    order = by_class(problem)
    H = library_hessian(problem)[np.ix_(order, order)].reshape(K, d, K, d)
    return H.transpose(1, 0, 3, 2).reshape(K * d, K * d)[np.ix_(*[np.argsort(order)] * 2)]


def fisher(problem) -> np.ndarray:
    return np.asarray(ix.Fisher("empirical").matrix(*at(problem)))


MUTANTS = {
    "ε of the wrong sign": replace(SUBJECT, gradients=lambda p: -library_gradients(p)),
    "influence of the wrong sign": replace(SUBJECT, influence=lambda p: -library.on_training(p)),
    "factors exchanged": replace(SUBJECT, hessian=transposed_blocks),
    "empirical Fisher for H": replace(SUBJECT, hessian=fisher),
    "Ω left out of H": replace(SUBJECT, hessian=lambda p: library_hessian(replace(p, l2=0 * p.l2))),
    "weights ignored": replace(SUBJECT, hessian=mutants.on(mutants.unweighted, library_hessian)),
    "agreement without − 1": replace(SUBJECT, agreement=lambda p, a, b: (a == b) / p[a]),
    "agreement without 1/p": replace(SUBJECT, agreement=lambda p, a, b: float(a == b) - 1),
    "features of other points": replace(
        SUBJECT,
        jacobian=lambda p: library_jacobian(replace(p, X=np.roll(p.X, 1, axis=0))),
    ),
    "damping dropped": replace(
        SUBJECT, influence=mutants.on(mutants.undamped, library.on_training)
    ),
}

STRATEGY = problems(SOFTMAX, TWO_CLASSES, BINARY)
register(Proposition("P12", "softmax head", STRATEGY, check, SUBJECT, MUTANTS))
