"""P9. Influence in fewer parameters: what it is exactly, and how far from the full one.

STATEMENT
    θ = (φ, ψ), ψ kept: I_ψ = −m_ψᵀ H_ψψ⁻¹ g_ψ.
    (a) I_ψ is exactly the influence in the model whose φ is frozen at φ̂.
    (b) I = I_ψ − r_mᵀS⁻¹r_g, r_v = v_φ − H_φψH_ψψ⁻¹v_ψ, S = H_φφ − H_φψH_ψψ⁻¹H_ψφ. So I = I_ψ if
        r_m = 0 or r_g = 0.
    (c) For *any* x̃_m, x̃_g and residuals ρ_v = v − Hx̃_v:
            I = −(x̃_mᵀg + ∇mᵀx̃_g − x̃_mᵀHx̃_g) − ρ_mᵀH⁻¹ρ_g,
            |I + bracket| ≤ √(ρ_mᵀH⁻¹ρ_m) √(ρ_gᵀH⁻¹ρ_g) ≤ ‖ρ_m‖‖ρ_g‖/λ_min(H).
        (b) is its case x̃_v = (0, H_ψψ⁻¹v_ψ) (Galerkin), whose bracket is −I_ψ.
    (d) gᵢ_ψᵀH_ψψ⁻¹gᵢ_ψ ≤ gᵢᵀH⁻¹gᵢ: a restricted self-influence never exceeds the full one.
    (e) With 0 < a ≤ λ_min(H), k Lanczos steps from ρ and the Gauss–Radau rule with a node at a bound
        ρᵀH⁻¹ρ from above; a = min l2 + λ will do for any H = positive semi-definite + diag(l2) + λI.

ASSUMPTIONS
    H symmetric positive definite (with damping, H + λI throughout); in (a), for I_ψ as a
    derivative, ψ̂ minimises J(φ̂, ·, w). (b)–(e) are linear algebra: a Gauss–Newton matrix may
    stand for H.

PROOF
    (a) J(φ̂, ·, w) is a risk in ψ, with minimiser ψ̂, Hessian H_ψψ, gradients g_ψ, m_ψ. Apply P1.
    (b) Block elimination: [H_φφ H_φψ; H_ψφ H_ψψ](x_φ, x_ψ) = (g_φ, g_ψ). The second row gives
        x_ψ = H_ψψ⁻¹(g_ψ − H_ψφx_φ); put into the first: Sx_φ = r_g. Hence
        ∇mᵀx = m_φᵀx_φ + m_ψᵀH_ψψ⁻¹g_ψ − m_ψᵀH_ψψ⁻¹H_ψφx_φ = m_ψᵀH_ψψ⁻¹g_ψ + r_mᵀS⁻¹r_g.
        I = −∇mᵀx. S ≻ 0 as the Schur complement of H ≻ 0.
    (c) ∇m = Hx̃_m + ρ_m and g = Hx̃_g + ρ_g. Expand
        ∇mᵀH⁻¹g = (Hx̃_m + ρ_m)ᵀH⁻¹(Hx̃_g + ρ_g) = x̃_mᵀHx̃_g + x̃_mᵀρ_g + ρ_mᵀx̃_g + ρ_mᵀH⁻¹ρ_g,
        and x̃_mᵀρ_g = x̃_mᵀg − x̃_mᵀHx̃_g, ρ_mᵀx̃_g = ∇mᵀx̃_g − x̃_mᵀHx̃_g; the sum is
        x̃_mᵀg + ∇mᵀx̃_g − x̃_mᵀHx̃_g + ρ_mᵀH⁻¹ρ_g. Cauchy–Schwarz in the metric H⁻¹ (P5), and
        ρᵀH⁻¹ρ ≤ ‖ρ‖²/λ_min. For x̃_v = (0, H_ψψ⁻¹v_ψ) each term of the bracket is m_ψᵀH_ψψ⁻¹g_ψ =
        −I_ψ, and ρ_v = (r_v, 0), whose form ρ_mᵀH⁻¹ρ_g = r_mᵀS⁻¹r_g: the φφ block of H⁻¹ is S⁻¹.
    (d) (b) with m = ℓᵢ: sᵢ = sᵢ_ψ + r_gᵀS⁻¹r_g and S⁻¹ ≻ 0.
    (e) With H = Σ λⱼuⱼuⱼᵀ, ρᵀH⁻¹ρ = ∫ f dμ, f(x) = 1/x, μ the positive measure Σ(uⱼᵀρ)² at λⱼ. The
        rule with the k Gauss nodes t of the modified measure (x − a)dμ and the node a is exact for
        polynomials of degree ≤ 2k. Its remainder is f^{(2k+1)}(ξ)/(2k + 1)! ∫ (x − a)Π(x − t)² dμ
        for some ξ in the hull: interpolate f at a once and at each t twice. f^{(2k+1)} < 0 for x >
        0, and the integrand is ≥ 0 since x ≥ a on the spectrum. So the integral is at most the
        rule. ∎

CHECK
    (a) against own re-minimisation of ψ alone, (b) and (c) by NumPy blocks and random x̃, (d), and
    (e): `restriction_bound` contains the truth at k = 1, and closes at k = P.

SOURCE
    P. W. Koh, P. Liang, arXiv:1703.04730, for the last layer; G. H. Golub, G. Meurant, "Matrices,
    Moments and Quadrature with Applications" (2010), for (e); (c) as a certificate is this
    project's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

import influx as ix

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import above, gap
from ._problems import NETWORK, SOFTMAX, problems
from ._registry import Proposition, register

DELTA = 3e-3


def weight(model):
    return model.weight


def last_layer(model):
    return model.layers[-1]


def where(problem) -> Callable:
    return weight if len(problem.family.sizes) == 2 else last_layer


def kept(problem) -> np.ndarray:
    """Where the kept parameters stand in θ: the weight of a linear model, the last layer of a net."""
    leaves = problem.family.leaves
    if len(problem.family.sizes) == 2:
        return np.arange(leaves[0])
    return np.arange(sum(leaves[:2]), sum(leaves))


def small(problem, curvature=ix.Hessian) -> ix.Influence:
    risk, model = library.risk_of(problem), library.model_at(problem.family, problem.theta)
    damping = jnp.asarray(problem.damping)
    return ix.influence(*ix.restrict(risk, model, where(problem)), curvature(damping=damping))


def restricted(problem) -> np.ndarray:
    return np.asarray(small(problem)(library.queries(problem)))


def restricted_linear(problem, vectors) -> np.ndarray:
    return np.asarray(ix.measure(small(problem), library.project)(jnp.asarray(vectors)))


def restricted_self(problem) -> np.ndarray:
    return -np.asarray(ix.self_influence(small(problem)))


def bound(problem, steps: int) -> SimpleNamespace:
    f = library.handle(problem, ix.GaussNewton)
    found = ix.restriction_bound(f, where(problem), library.queries(problem), steps=steps)
    names = ("restricted", "lower", "upper", "full_lower", "full_upper")
    return SimpleNamespace(**{name: np.asarray(getattr(found, name)) for name in names})


def estimate(v, g, x_v, x_g, H) -> np.ndarray:
    """(c) without its last term."""
    return -(x_v @ g.T + v @ x_g.T - x_v @ H @ x_g.T)


@dataclass(frozen=True)
class Subject:
    restricted: Callable
    restricted_linear: Callable
    restricted_self: Callable
    full: Callable
    estimate: Callable
    bound: Callable


SUBJECT = Subject(
    restricted, restricted_linear, restricted_self, library.influence, estimate, bound
)


def check(problem, subject) -> dict[str, float]:
    return {
        **frozen(problem, subject),
        **schur(problem, subject),
        **lemma(problem, subject),
        **certificate(problem, subject),
    }


def frozen(problem, subject) -> dict[str, float]:
    """(a) by central differences of ψ re-minimised alone."""
    points, theta, psi = [int(np.argmin(problem.w)), 3], problem.theta, kept(problem)
    lam = problem.damping

    def embed(part):
        whole = theta.astype(part.dtype)
        whole[psi] = part
        return whole

    def moved(i, change):
        w = problem.w + change * np.eye(problem.n)[i]
        part = oracle.newton(
            lambda t: (
                oracle.objective(problem, embed(t), w) + 0.5 * lam * ((t - theta[psi]) ** 2).sum()
            ),
            lambda t: oracle.gradient(problem, embed(t), w)[psi] + lam * (t - theta[psi]),
            lambda t: (
                oracle.hessian(problem, embed(t), w)[np.ix_(psi, psi)] + lam * np.eye(psi.size)
            ),
            theta[psi],
        )
        return oracle.measurement(problem, "loss", embed(part))

    def central(delta):
        slopes = [(moved(i, delta) - moved(i, -delta)) / (2 * delta) for i in points]
        return problem.n * np.stack(slopes, axis=1)

    got = subject.restricted(problem)[:, points]
    return {"frozen": gap(got, (4 * central(DELTA / 2) - central(DELTA)) / 3, rtol=1e-6)}


def blocks(problem):
    """Where φ and ψ stand in θ, H_φψH_ψψ⁻¹, and S."""
    H, psi = oracle.curvature(problem), kept(problem)
    phi = np.setdiff1d(np.arange(len(H)), psi)
    mixed = H[np.ix_(phi, psi)] @ np.linalg.inv(H[np.ix_(psi, psi)])
    S = H[np.ix_(phi, phi)] - mixed @ H[np.ix_(psi, phi)]
    return phi, psi, mixed, S


def schur(problem, subject) -> dict[str, float]:
    phi, psi, mixed, S = blocks(problem)
    rest = lambda v: v[:, phi] - v[:, psi] @ mixed.T
    g = oracle.gradients(problem, problem.theta)
    v = oracle.measurement_gradient(problem)
    leftover = rest(v) @ np.linalg.solve(S, rest(g).T)
    blind = np.random.default_rng(problem.seed).normal(size=(2, len(problem.theta)))
    blind[:, phi] = blind[:, psi] @ mixed.T
    full = library.linear(problem, blind)
    s = subject.restricted_self(problem)
    return {
        "Schur": gap(subject.full(problem), subject.restricted(problem) - leftover),
        "r_m = 0": gap(subject.restricted_linear(problem, blind), full),
        "monotone": above(s, oracle.self_influence_size(problem)),
        "self": gap(s, np.einsum("np,pn->n", g[:, psi], psi_solve(problem, g[:, psi].T))),
    }


def psi_solve(problem, b):
    psi = kept(problem)
    return np.linalg.solve(oracle.curvature(problem)[np.ix_(psi, psi)], b)


def lemma(problem, subject) -> dict[str, float]:
    """(c) for x̃ that are off by a tenth in every direction."""
    H, rng = oracle.curvature(problem), np.random.default_rng(problem.seed)
    v, g = oracle.measurement_gradient(problem), oracle.gradients(problem, problem.theta)
    near = lambda b: np.linalg.solve(H, b.T).T * (1 + 0.1 * rng.normal(size=b.shape))
    x_v, x_g = near(v), near(g)
    rho_v, rho_g = v - x_v @ H, g - x_g @ H
    bracket, full = subject.estimate(v, g, x_v, x_g, H), subject.full(problem)
    form = lambda r: np.sqrt(np.einsum("kp,pk->k", r, np.linalg.solve(H, r.T)))
    norm = lambda r: np.linalg.norm(r, axis=1)
    fine = np.outer(form(rho_v), form(rho_g))
    crude = np.outer(norm(rho_v), norm(rho_g)) / np.linalg.eigvalsh(H)[0]
    return {
        "lemma": gap(full, bracket - rho_v @ np.linalg.solve(H, rho_g.T)),
        "lemma, bound": above(np.abs(full - bracket), fine),
        "lemma, crude bound": above(fine, crude),
    }


def certificate(problem, subject) -> dict[str, float]:
    G = oracle.gauss_newton(problem, problem.theta) + problem.damping * np.eye(len(problem.theta))
    psi = kept(problem)
    v, g = oracle.measurement_gradient(problem), oracle.gradients(problem, problem.theta)
    full = -v @ np.linalg.solve(G, g.T)
    part = -v[:, psi] @ np.linalg.solve(G[np.ix_(psi, psi)], g[:, psi].T)
    distance, size = np.abs(full - part), np.abs(full).max()
    got = subject.bound(problem, 1)
    errors = {
        "enclosure, upper": above(distance, got.upper, size=size),
        "enclosure, lower": above(got.lower, distance, size=size),
        "enclosure, full": max(
            above(got.full_lower, full, size=size), above(full, got.full_upper, size=size)
        ),
        "enclosure, I_ψ": gap(got.restricted, part),
    }
    closed = subject.bound(problem, len(problem.theta))
    errors["closes at k = P"] = gap(closed.full_upper, closed.full_lower, atol=1e-6 * size)
    return errors


def around_restricted(problem, steps):
    """The error's bound laid around I_ψ instead of the improved centre."""
    got = bound(problem, steps)
    half = (got.full_upper - got.full_lower) / 2
    return SimpleNamespace(
        **{**vars(got), "full_lower": got.restricted - half, "full_upper": got.restricted + half}
    )


def squared_bound(problem, steps):
    """A root forgotten: ρᵀH⁻¹ρ in place of its root, in relative size."""
    got = bound(problem, steps)
    middle, half = (got.full_upper + got.full_lower) / 2, (got.full_upper - got.full_lower) / 2
    half = half**2
    return SimpleNamespace(
        **{**vars(got), "full_lower": middle - half, "full_upper": middle + half}
    )


def in_place_of_inverse(problem) -> np.ndarray:
    """The kept block of the inverse in place of the inverse of the kept block."""
    psi = kept(problem)
    v, g = oracle.measurement_gradient(problem), oracle.gradients(problem, problem.theta)
    inverse = np.linalg.inv(oracle.curvature(problem))[np.ix_(psi, psi)]
    return -v[:, psi] @ inverse @ g[:, psi].T


MUTANTS = {
    "sign": replace(SUBJECT, restricted=lambda p: -restricted(p)),
    "full in place of restricted": replace(SUBJECT, restricted=library.influence),
    "block of the inverse": replace(SUBJECT, restricted=in_place_of_inverse),
    "weights ignored": replace(SUBJECT, restricted=mutants.on(mutants.unweighted, restricted)),
    "damping dropped": replace(SUBJECT, restricted=mutants.on(mutants.undamped, restricted)),
    "full self-influence": replace(SUBJECT, restricted_self=lambda p: -library.self_influence(p)),
    "lemma without its third term": replace(
        SUBJECT, estimate=lambda v, g, x_v, x_g, H: -(x_v @ g.T + v @ x_g.T)
    ),
    "one approximate solve": replace(SUBJECT, estimate=lambda v, g, x_v, x_g, H: -v @ x_g.T),
    "bound around I_ψ": replace(SUBJECT, bound=around_restricted),
    "bound squared": replace(SUBJECT, bound=squared_bound),
    "bound of another damping": replace(SUBJECT, bound=mutants.on(mutants.damped_twice, bound)),
}

STRATEGY = problems(SOFTMAX, NETWORK)
register(Proposition("P9", "fewer parameters", STRATEGY, check, SUBJECT, MUTANTS))
