"""P7. What influence and relative influence do under scaling, reparametrisation, permutation and
duplication.

STATEMENT
    (a) Scaling ℓ → cℓ, Ω → cΩ, λ → cλ with c > 0 multiplies the scores by c to these powers, for m
        fixed and for m → cm (the training loss of a query, say):

            plain 0/1    parameters 0/1    loss −½/½    self −1/0    cosine 0/0    reference 0/0

    (b) Let θ = T(φ), T a diffeomorphism, Ω carried along (Ω∘T) and λ = 0. At a stationary point
        plain influence, by loss, by self and cosine do not change; by parameters does, in general.
        Away from a stationary point the Hessian's influence changes; that of the Gauss–Newton
        matrix does not, provided that Ω's curvature is Gauss–Newton too (DTᵀ ∇²Ω DT); with the
        exact ∇²(Ω∘T) it changes.
    (c) Permuting the training data permutes the columns.
    (d) A duplicated point of weight w equals one point of weight 2w, and weight 0 equals absent,
        *with* l2 → l2·n/n', λ → λ·n/n', where n' is the number of rows after the change. The
        minimiser and the removal effects are then equal, the influences differ by the factor n'/n.

ASSUMPTIONS
    H + λI ≻ 0 on both sides. (b): T twice continuously differentiable with an invertible Jacobian
    D.

PROOF
    (a) g → cg, H + λI → c(H + λI), so H⁻¹g is unchanged, with θ̂ itself. Fixed m: I = −∇mᵀH⁻¹g has
        power 0; ‖H⁻¹g‖ power 0; sᵢ = gᵀH⁻¹g power 1; ∇mᵀH⁻¹∇m power −1. m → cm: I gains 1 and
        ∇mᵀH⁻¹∇m becomes power +1. Divide: by √s (½), by s (1), by √(s·∇mᵀH⁻¹∇m) (0 for fixed m; ½
        + ½ = 1 for scaled), by I(r; m) (0; 1). That is the table.
    (b) Write φ-quantities with a tilde. g̃ = Dᵀg, ∇̃m = Dᵀ∇m, and the chain rule for second
        derivatives is
            H̃ = DᵀHD + Σ_k (∂J/∂θ_k) ∇²T_k.
            (*)
        At a stationary point ∂J/∂θ = 0, H̃ = DᵀHD and H̃⁻¹ = D⁻¹H⁻¹D⁻ᵀ. For any u, v:
        (Dᵀu)ᵀH̃⁻¹(Dᵀv) = uᵀH⁻¹v. Plain influence, sᵢ and ∇mᵀH⁻¹∇m are such forms: unchanged. But
        ‖H̃⁻¹g̃‖ = ‖D⁻¹H⁻¹g‖ ≠ ‖H⁻¹g‖ unless D is orthogonal. Off stationarity the last sum in (*)
        stays. The Gauss–Newton matrix Σ AᵀSA sees T through Ã = AD only: DᵀGD, no second
        derivative of T. If Ω enters it as DᵀdiagΩ''D, the whole is DᵀGD; if as ∇²(Ω∘T), the term
        Σ_k (∂Ω/∂θ_k)∇²T_k is left.
    (c) J is a sum over points, and H with it; column i reads gᵢ, which moves with its point.
    (d) J'(θ) = (1/n') Σ' + (n/n')Ω = (n/n') [(1/n) Σ' + Ω], where Σ' over the n' rows is the same
        function as Σ over the n rows (two terms wℓ are one term 2wℓ; a term 0·ℓ is none). So J' =
        (n/n')J, with the same minimiser, and H' + λ'I = (n/n')(H + λI). g is unchanged: I' =
        (n'/n) I. The removal effect −wᵢI'/n' = −wᵢI/n is unchanged. Without rescaling l2, J' is
        another problem (a mutant). ∎

CHECK
    The library on both sides of each statement that holds, NumPy on both sides of the two that tell
    what fails off θ̂; in (b) with T(φ) = B(φ + β sin φ), Ω carried along
    as one more datum whose loss is nΩ/w, so that influx's own l2 is 0.

SOURCE
    Invariance under reparametrisation: J. Martens, "New insights and perspectives on the natural
    gradient method", arXiv:1412.1193, for the Gauss–Newton matrix; the table is this project's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import influx as ix

from . import _library as library
from . import _mutants as mutants
from . import _oracle as oracle
from ._errors import apart, gap
from ._oracle import Problem
from ._problems import SOFTMAX, SQUARED, problems
from ._registry import Proposition, register

POWERS = {
    "plain": (0, 1),
    "parameters": (0, 1),
    "loss": (-0.5, 0.5),
    "self": (-1, 0),
    "cosine": (0, 0),
    "reference": (0, 0),
}
C = 2.7


class Times(eqx.Module):
    """c times a loss."""

    loss: Callable
    factor: jnp.ndarray

    def __call__(self, output, target):
        return self.factor * self.loss(output, target)


class Bent(eqx.Module):
    """Outputs at θ = B(φ + β sin φ), and √l2 ∘ θ beside them so that Ω is a loss of the output."""

    mix: jnp.ndarray
    bend: jnp.ndarray
    root_l2: jnp.ndarray

    def __call__(self, model, x):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        phi, rebuild = ravel_pytree(params)
        theta = self.mix @ (phi + self.bend * jnp.sin(phi))
        output = eqx.combine(rebuild(theta), static)(x)
        return jnp.concatenate([output, self.root_l2 * theta])


class OrPenalty(eqx.Module):
    """The loss of a datum, or Ω for the one datum that stands for it."""

    loss: Callable
    outputs: int = eqx.field(static=True)

    def __call__(self, output, target):
        y, is_penalty = target
        data = self.loss(output[: self.outputs], y)
        penalty = 0.5 * jnp.sum(output[self.outputs :] ** 2)
        return jnp.where(is_penalty, penalty, data)


def scored(f, kind: str, queries):
    if kind != "plain":
        f = ix.relative(f, ix.Reference(0) if kind == "reference" else kind)
    return np.asarray(f(queries))


def scaled(problem: Problem, c: float) -> ix.Influence:
    """(a): the loss, Ω and the damping times c."""
    risk = ix.EmpiricalRisk(
        library.training(problem),
        ix.CustomLoss(Times(library.loss_of(problem), jnp.asarray(c))),
        l2=library.l2_of(replace(problem, l2=c * problem.l2)),
        weights=jnp.asarray(problem.w),
    )
    model = library.model_at(problem.family, problem.theta)
    return ix.influence(risk, model, ix.Hessian(damping=jnp.asarray(c * problem.damping)))


def chart(problem: Problem, bent: bool):
    """B, β and the φ̂ that T sends to θ̂; the identity unless `bent`."""
    P = problem.theta.size
    if not bent:
        return np.eye(P), 0.0, problem.theta
    rng = np.random.default_rng(problem.seed)
    mix, bend = np.eye(P) + 0.4 * rng.normal(size=(P, P)) / np.sqrt(P), 0.4
    u = np.linalg.solve(mix, problem.theta)
    phi = u
    for _ in range(60):
        phi = phi - (phi + bend * np.sin(phi) - u) / (1 + bend * np.cos(phi))
    return mix, bend, phi


def reparametrised(
    problem: Problem, bent: bool, curvature=ix.Hessian, *, carried: bool = True
) -> ix.Influence:
    """(b): the same problem in θ, or in φ; Ω is that of θ, or of φ itself unless `carried`."""
    mix, bend, phi = chart(problem, bent)
    blank = lambda a: np.concatenate([a, 0 * a[:1]])
    is_penalty = np.arange(problem.n + 1) == problem.n
    risk = ix.EmpiricalRisk(
        (blank(problem.X), (blank(problem.y), is_penalty)),
        ix.CustomLoss(OrPenalty(library.loss_of(problem), problem.family.sizes[-1])),
        l2=0.0 if carried else library.l2_of(problem),
        weights=jnp.asarray(np.append(problem.w, problem.n if carried else 0)),
        predict=Bent(jnp.asarray(mix), jnp.asarray(bend), jnp.asarray(np.sqrt(problem.penalty))),
    )
    return ix.influence(risk, library.model_at(problem.family, phi), curvature())


def rescaled(problem: Problem, n: int) -> Problem:
    """(d): l2 and λ for rows that used to count `n`, at the number they count now."""
    factor = n / problem.n
    return replace(problem, l2=problem.l2 * factor, damping=problem.damping * factor)


def rows(problem: Problem, chosen) -> Problem:
    return replace(problem, X=problem.X[chosen], y=problem.y[chosen], w=problem.w[chosen])


@dataclass(frozen=True)
class Subject:
    powers: Mapping[str, tuple[float, float]]
    scaled: Callable
    reparametrised: Callable
    influence: Callable
    rescaled: Callable


SUBJECT = Subject(POWERS, scaled, reparametrised, library.influence, rescaled)


def check(problem, subject) -> dict[str, float]:
    flat = replace(problem, damping=0.0)
    return {
        **scaling(problem, subject),
        **charts(flat, subject),
        **permutation(problem, subject),
        **duplicates(problem, subject),
    }


def scaling(problem, subject) -> dict[str, float]:
    before, after = subject.scaled(problem, 1.0), subject.scaled(problem, C)
    vectors = jnp.asarray(np.random.default_rng(problem.seed).normal(size=(2, problem.theta.size)))
    fixed = lambda f: ix.measure(f, library.project)
    errors = {}
    for kind, (power_fixed, power_scaled) in subject.powers.items():
        errors[f"fixed m, {kind}"] = gap(
            scored(fixed(after), kind, vectors),
            C**power_fixed * scored(fixed(before), kind, vectors),
        )
        queries = library.queries(problem)
        errors[f"scaled m, {kind}"] = gap(
            scored(after, kind, queries), C**power_scaled * scored(before, kind, queries)
        )
    return errors


def charts(problem, subject) -> dict[str, float]:
    queries = (problem.Xq, (problem.yq, np.zeros(len(problem.yq), bool)))
    straight, bent = (subject.reparametrised(problem, b) for b in (False, True))
    errors = {
        f"chart, {kind}": gap(scored(bent, kind, queries), scored(straight, kind, queries))
        for kind in ("plain", "loss", "self", "cosine")
    }
    by_parameters = [scored(f, "parameters", queries) for f in (bent, straight)]
    errors["chart, parameters differ"] = apart(*by_parameters, least=1e-3)
    moved = mutants.elsewhere(problem)
    off = [subject.reparametrised(moved, b, ix.GaussNewton)(queries) for b in (True, False)]
    errors["chart, Gauss–Newton off θ̂"] = gap(*off)
    errors["chart, Hessian off θ̂ differs"] = apart(*hessian_off(moved), least=1e-6)
    errors["chart, exact Ω off θ̂ differs"] = apart(*exact_penalty_off(moved), least=1e-6)
    return errors


def hessian_off(problem):
    """Influence by the Hessian in φ, from (*), and in θ."""
    G, gradient = oracle.hessian(problem, problem.theta), oracle.gradient(problem, problem.theta)
    return chart_and_plain(problem, G, gradient)


def exact_penalty_off(problem):
    """Influence by the Gauss–Newton matrix of the data plus the exact ∇²(Ω∘T), and in θ."""
    G = oracle.gauss_newton(problem, problem.theta)
    return chart_and_plain(problem, G, problem.penalty * problem.theta)


def chart_and_plain(problem, G, gradient):
    """−∇̃mᵀ(DᵀGD + Σ_k gradient_k ∇²T_k)⁻¹g̃, and −∇mᵀG⁻¹g."""
    mix, bend, phi = chart(problem, True)
    D = mix * (1 + bend * np.cos(phi))
    second = np.diag(-bend * np.sin(phi) * (mix.T @ gradient))
    v, g = oracle.measurement_gradient(problem), oracle.gradients(problem, problem.theta)
    tilted = -(v @ D) @ np.linalg.solve(D.T @ G @ D + second, (g @ D).T)
    return tilted, -v @ np.linalg.solve(G, g.T)


def permutation(problem, subject) -> dict[str, float]:
    order = np.random.default_rng(problem.seed).permutation(problem.n)
    permuted = subject.influence(rows(problem, order))
    return {"permutation": gap(permuted, subject.influence(problem)[:, order])}


def duplicates(problem, subject) -> dict[str, float]:
    n, k = problem.n, int(np.argmax(problem.w))
    doubled = replace(problem, w=problem.w * np.where(np.arange(n) == k, 2.0, 1.0))
    doubled = replace(doubled, theta=oracle.minimise(doubled))
    twin = rows(problem, np.append(np.arange(n), k))
    twin = subject.rescaled(replace(twin, theta=doubled.theta), n)
    others = np.flatnonzero(np.arange(n) != k)
    kept = np.flatnonzero(problem.w > 0)
    absent = subject.rescaled(rows(problem, kept), n)
    removal = lambda p: -subject.influence(p) * p.w / p.n
    stationary = [oracle.gradient(p, p.theta) for p in (twin, absent)]
    whole = removal(doubled)
    copy = removal(twin)
    return {
        "same minimiser": max(gap(g, 0 * g, atol=1e-10) for g in stationary),
        "duplicate, removal of others": gap(copy[:, others], whole[:, others]),
        "duplicate, removal of both": gap(copy[:, k] + copy[:, n], whole[:, k]),
        "duplicate, influence": gap(
            subject.influence(twin)[:, :n], (n + 1) / n * subject.influence(doubled)
        ),
        "absent, removal": gap(removal(absent), removal(problem)[:, kept]),
        "absent, influence": gap(
            subject.influence(absent), len(kept) / n * subject.influence(problem)[:, kept]
        ),
    }


def powers(**changed) -> Subject:
    return replace(SUBJECT, powers={**POWERS, **changed})


def chart_without_penalty(problem, bent, curvature=ix.Hessian):
    """Ω of φ, ½ Σ l2 φ², in place of Ω∘T."""
    return reparametrised(problem, bent, curvature, carried=False)


def scaled_but(**kept) -> Callable:
    """The scaling with l2 or the damping left as it was."""

    def wrong(problem, c):
        changes = {name: getattr(problem, name) / c for name in kept}
        return scaled(replace(problem, **changes), c)

    return wrong


MUTANTS = {
    "by loss taken as invariant": powers(loss=(0, 0)),
    "by self squared": powers(self=(-2, 0)),
    "cosine like plain": powers(cosine=(0, 1)),
    "reference like plain": powers(reference=(0, 1)),
    "Ω not scaled": replace(SUBJECT, scaled=scaled_but(l2=True)),
    "damping not scaled": replace(SUBJECT, scaled=scaled_but(damping=True)),
    "Ω not carried along": replace(SUBJECT, reparametrised=chart_without_penalty),
    "not at a stationary point": replace(
        SUBJECT, reparametrised=mutants.on(mutants.elsewhere, reparametrised)
    ),
    "columns ordered by size": replace(
        SUBJECT, influence=lambda p: np.sort(library.influence(p), axis=1)
    ),
    "divided by n": replace(SUBJECT, influence=lambda p: library.influence(p) / p.n),
    "l2 kept with other n": replace(SUBJECT, rescaled=lambda p, n: p),
    "l2 · n'/n": replace(
        SUBJECT, rescaled=lambda p, n: replace(p, l2=p.l2 * p.n / n, damping=p.damping * p.n / n)
    ),
    "λ kept with other n": replace(
        SUBJECT, rescaled=lambda p, n: replace(rescaled(p, n), damping=p.damping)
    ),
}

register(Proposition("P7", "invariances", problems(SOFTMAX, SQUARED), check, SUBJECT, MUTANTS))
