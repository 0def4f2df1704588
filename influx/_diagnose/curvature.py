"""Whether an influence by a curvature can be trusted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int

from .._chunks import take
from .._curvature import AbstractFactored
from .._curvature.iterative import Iterative
from .._gradients import example_gradient, map_gradients, risk_gradient
from .._influence import Influence
from .._linalg import ravel
from .._response import implicit_response
from .._scale import Unscaled
from .._solver.bounds import ritz_values
from .base import Finding, finding, judge

# Solves of a curvature that is no matrix are dear: that many training points and directions are drawn.
_DRAWN = 32


def of_curvature(f: Influence) -> tuple[Finding, ...]:
    """The findings of an implicit response."""
    response = implicit_response(f.response, "diagnose")
    state = _measure(f)
    low, high = _extremes(f, response.factored)
    return (
        _stationarity(f, state),
        _spectrum(f, low, high),
        _dimension(f),
        _solve(f, state, low),
        _precision(state),
        _self_influence(f, state),
        _undefined(f, state),
    )


@eqx.filter_jit
def _measure(f: Influence) -> dict:
    theta, _ = ravel(f.model)
    squares = map_gradients(lambda _, g: jnp.vdot(g, g), f.risk, f.model)
    drawn = _drawn(f)
    gradient = risk_gradient(f.risk, f.model)
    u, v = jr.normal(jr.key(0), (2, theta.size), theta.dtype)
    factored = implicit_response(f.response, "diagnose").factored
    x, converged = factored.try_solve(u)
    y, _ = factored.try_solve(v)

    def self_product(_, g):
        solved, done, steps = factored.counted_solve(g)
        missed = None if factored.layered is None else factored.layered.missed(g)
        residual = jnp.linalg.norm(g - factored.matvec(solved))
        return jnp.vdot(g, solved), residual, done, steps, missed

    data = take(f.risk.data, drawn)
    s, residuals, done, steps, missed = map_gradients(self_product, f.risk, f.model, data)
    return {
        "gradient": jnp.linalg.norm(gradient),
        "typical": jnp.sqrt(
            jnp.mean(jnp.square(f.risk.weights) * squares, where=f.risk.weights > 0)
        ),
        "still": jnp.sum(squares == 0),
        "self": s,
        "rise": f.risk.weights[drawn] * s / f.risk.n,
        "residuals": residuals,
        "missed": missed,
        "norms": jnp.sqrt(squares[drawn]),
        "probe": jnp.linalg.norm(u - factored.matvec(x)) / jnp.linalg.norm(u),
        "converged": converged & jnp.all(done),
        "steps": steps,
        "plain": _plain_steps(f, factored, take(data, 0), steps),
        "asymmetry": jnp.abs(jnp.vdot(v, x) - jnp.vdot(u, y))
        / jnp.sqrt(jnp.abs(jnp.vdot(u, x) * jnp.vdot(v, y))),
    }


def _plain_steps(f: Influence, factored: AbstractFactored, example, steps):
    """The steps of one solve without the preconditioner, at most ten times `steps`, and whether they
    sufficed; `None` where there is no preconditioner."""
    if not isinstance(factored, Iterative) or factored.preconditioner is None:
        return None
    plain = factored.unaided(10 * jnp.max(steps))
    _, done, count = plain.counted_solve(example_gradient(f.risk, f.model, example))
    return count, done


def _drawn(f: Influence) -> Int[Array, " k"]:
    """The training points that are solved with: all where the curvature is a matrix."""
    few = implicit_response(f.response, "diagnose").factored.matrix is None and f.risk.n > _DRAWN
    return jr.permutation(jr.key(3), f.risk.n)[:_DRAWN] if few else jnp.arange(f.risk.n)


def _extremes(f: Influence, factored: AbstractFactored) -> tuple[float, float]:
    """The extreme eigenvalues of H + λI: exactly where it is dense, else the extreme Ritz values."""
    if factored.matrix is not None:
        values = np.linalg.eigvalsh(np.asarray(factored.matrix))
        return float(values[0]), float(values[-1])
    values = _ritz_values(factored, ravel(f.model)[0])
    return float(values[0]), float(values[-1])


@eqx.filter_jit
def _ritz_values(factored: AbstractFactored, theta):
    return ritz_values(factored.matvec, theta, 40)


def _stationarity(f: Influence, state: dict) -> Finding:
    ratio = float(state["gradient"] / (state["typical"] / f.risk.n))
    double = state["gradient"].dtype == np.float64
    newton = "influx.Newton()" if double else "influx.Newton(tolerance=1e-6)"
    return finding(
        "stationarity",
        f"|grad J| = {float(state['gradient']):.2e}, {ratio:.1e} of one point's slope",
        judge(ratio, 0.01, 1.0),
        "Influence is the derivative at a minimum: what is left of training is compared with what "
        "removing one point does.",
        f"Train further: `model = influx.fit(risk, model, {newton})`, or LBFGS for a network of smooth "
        "activations (one with ReLU has kinks, where no gradient vanishes); "
        + ('`removal(f, "newton")` subtracts what is left of training, and ' if _steps(f) else "")
        + "`pbrf` is the ground truth of a network as it is.",
    )


def _spectrum(f: Influence, low: float, high: float) -> Finding:
    theta, _ = ravel(f.model)
    condition = high / low if low > 0 else np.inf
    loss = condition * float(jnp.finfo(theta.dtype).eps)
    return finding(
        "spectrum",
        f"eigenvalues {low:.2e} … {high:.2e}, condition {condition:.1e}",
        judge(loss, 1e-8, 1e-3),
        "Directions with a small eigenvalue multiply errors of gradients; not positive means no "
        "minimum.",
        "Raise l2 or damping, drop duplicate or constant features, or compute in float64.",
    )


def _dimension(f: Influence) -> Finding:
    theta, _ = ravel(f.model)
    dimension, error = _effective_dimension(f)
    dimension, error = float(dimension), float(error)
    return finding(
        "effective dimension",
        f"{dimension:.1f}{f' ± {error:.1f}' if error else ''} of {theta.size}",
        judge(-dimension, -1.0, -0.1),
        "Directions whose size the data decide rather than l2 and damping. Near 0, influence is a "
        "gradient dot product in disguise.",
        "Lower l2, or the damping (which is added to a curvature that already contains l2).",
    )


@eqx.filter_jit
def _effective_dimension(f: Influence):
    """tr (H − l2)(H + λ)⁻¹ = P − tr (l2 + λ)(H + λ)⁻¹: exact for a matrix of P ≤ 2000, else from sign
    probes with their standard error."""
    theta, _ = ravel(f.model)
    response = implicit_response(f.response, "diagnose")
    found = response.factored.dampings
    damping = jnp.asarray(response.curvature.damping, theta.dtype) if found is None else found
    prior = f.risk.l2_vector(f.model) + damping
    form = lambda z: jnp.vdot(prior * z, response.factored.try_solve(z)[0])
    if theta.size <= (2000 if response.factored.matrix is not None else _DRAWN):
        basis = jnp.eye(theta.size, dtype=theta.dtype)
        return theta.size - jnp.sum(jax.lax.map(form, basis, batch_size=64)), 0.0
    signs = jr.rademacher(jr.key(2), (_DRAWN, theta.size)).astype(theta.dtype)
    samples = theta.size - jax.lax.map(form, signs)
    return jnp.mean(samples), jnp.std(samples, ddof=1) / jnp.sqrt(jnp.asarray(_DRAWN, theta.dtype))


def _solve(f: Influence, state: dict, low: float) -> Finding:
    s, residuals, norms = (np.asarray(state[k]) for k in ("self", "residuals", "norms"))
    relative = float(np.max(np.where(norms > 0, residuals / np.where(norms > 0, norms, 1), 0)))
    relative = max(relative, float(state["probe"]))
    end, proven = known_lower_end(f, low)
    # A point that is fitted beyond doubt has scores that are 0 beside the others': it decides nothing.
    floored = np.maximum(s, np.mean(s))
    energy = np.sqrt(np.maximum(max(end, 0.0) * floored, 0))  # 0 where no bound is known, or s is 0
    known = residuals / np.where(energy > 0, energy, 1)
    solved = float(np.max(np.where(energy > 0, known, np.where(norms > 0, np.inf, 0))))
    terms, of_any_query = _by_terms(f, state)
    bound = solved + terms
    converged = bool(state["converged"])
    verdict = judge(bound, 1e-3, 0.1) if converged else "bad"
    drawn = f" for {s.size} points drawn" if s.size < f.risk.n else ""
    remedy = (
        "Raise the damping, or compute in float64 (`jax_enable_x64`)."
        if state["steps"] is None
        else "Allow more steps (`max_steps=`) or a smaller `rtol=`, give CG a `preconditioner=`, raise "
        "the damping, or solve directly."
    )
    return finding(
        "solve",
        f"{_count(state)}relative residual {relative:.1e}, "
        f"score error {'at most' if proven else 'estimated at'} {bound:.1e} of √(s̄ᵢs̄ⱼ){drawn}"
        + (f", {terms:.1e} of it by `tolerance` ({of_any_query:.1e} of a query)" if terms else ""),
        verdict,
        "How well the linear solves were done" + (
            ": every one met its tolerance." if converged else ": some did NOT converge."
        ),
        ("A smaller `tolerance=`, or 0. " if terms else "") + remedy,
    )  # fmt: skip


def _by_terms(f: Influence, state: dict) -> tuple[float, float]:
    """The most that the few terms of a `tolerance` change a score: of two training points in units of
    √(s̄ᵢs̄ⱼ), and of one with any query q of √(s_q s̄ⱼ)."""
    layered = implicit_response(f.response, "diagnose").factored.layered
    if layered is None:
        return 0.0, 0.0
    s, missed = np.asarray(state["self"]), np.asarray(state["missed"])
    floored = np.maximum(s, np.mean(s))
    of_points = float(np.max(missed / floored)) if np.mean(s) > 0 else 0.0
    return of_points, float(np.sqrt(of_points * layered.most_missed))


def known_lower_end(f: Influence, low: float) -> tuple[float, bool]:
    """A number below the spectrum of H + λI, and whether it is known to be: `low` is the least
    eigenvalue of a matrix, or the least Ritz value of any other."""
    response = implicit_response(f.response, "diagnose")
    if response.factored.matrix is not None:
        return low, True
    known = response.curvature.lower_end(f.risk, f.model)
    return (known, True) if known is not None and known > 0 else (low, False)


def _count(state: dict) -> str:
    if state["steps"] is None:
        return ""
    most = f"at most {int(np.max(state['steps']))} steps"
    if state["plain"] is None:
        return f"{most}, "
    plain, done = state["plain"]
    return f"{most} ({'' if bool(done) else 'over '}{int(plain)} without the preconditioner), "


def _precision(state: dict) -> Finding:
    asymmetry = float(state["asymmetry"])
    return finding(
        "precision",
        f"{asymmetry:.1e} asymmetry of u·H⁻¹v, in {state['self'].dtype}",
        judge(asymmetry, 1e-3, 0.05),
        "H⁻¹ is symmetric; what is not, was lost to rounding or to the solver.",
        "Compute in float64 (`jax_enable_x64`), or raise l2 or damping.",
    )


def _steps(f: Influence) -> bool:
    """Whether `f` can take Newton steps without a point."""
    return implicit_response(f.response, "diagnose").newton is not None


def _self_influence(f: Influence, state: dict) -> Finding:
    rise = np.asarray(state["rise"])
    top, drawn = float(np.max(rise)), f" of {rise.size} drawn" if rise.size < f.risk.n else ""
    return finding(
        "self-influence",
        f"own loss rises by up to {top:.2f} on removal, "
        f"{int((rise > 0.2).sum())} points{drawn} above 0.2",
        "good" if top < 0.2 else "warning",
        "Where removing a point moves its own loss by much, the model without it is far off, and "
        "first order, a tangent, misjudges the change: most often it underestimates it.",
        '`removal(f, "newton")` and `memorization(f, "newton")` follow the curve; `certify` says how '
        "far they are to be trusted."
        if _steps(f)
        else "Newton steps follow the curve: ask by GaussNewton(), of the last layer alone "
        "(`influx.restrict`) where P² does not fit, or retrain by `leave_one_out`.",
    )


def _undefined(f: Influence, state: dict) -> Finding:
    count = int(state["still"] if isinstance(f.scale, Unscaled) else jnp.sum(f.undefined))
    return finding(
        "undefined",
        f"{count} of {f.risk.n} points",
        "warning" if count else "good",
        "Training points whose relative influence is 0/0 and stands as NaN: those of gradient 0.",
        '`relative(f, "loss").undefined` lists them; plain influence of those points is 0.',
    )
