"""The laws of influence, run on a user's own risk and model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int

from ._checks import check_whole, require_concrete
from ._chunks import take
from ._curvature import AbstractCurvature, Hessian, check_curvature
from ._custom_types import Model
from ._gradients import example_gradient, map_gradients, risk_gradient
from ._influence import Influence, influence
from ._linalg import dot, ravel
from ._response import implicit_response
from ._risk import EmpiricalRisk
from ._train.base import AbstractTrainer, check_trainer
from ._train.newton import Newton
from ._transform import classification, removal, self_influence
from ._truth import leave_subset_out
from ._validate import class_logits_shape, validate

# Derivatives below this share of what is usual have lost digits that no law can ask for.
_FITTED = 1e-4
# Beyond this many, what forms or trains with matrices of that size is left out.
_MOST_PARAMETERS = 2000


class Law(eqx.Module):
    """One law on one problem: the worst `error`, relative to its scale, against `tolerance`; `reason`
    says why a law does not apply (then `error` is NaN)."""

    name: str
    statement: str
    error: float
    tolerance: float
    reason: str = ""

    @property
    def status(self) -> str:
        if self.reason:
            return "skipped"
        return "holds" if self.error <= self.tolerance else "BROKEN"


class Report(eqx.Module):
    """The laws that `check` ran. `.holds`: none is broken. `str(report)` is a plain table."""

    laws: tuple[Law, ...]

    @property
    def holds(self) -> bool:
        return all(law.status != "BROKEN" for law in self.laws)

    def __str__(self) -> str:
        return "\n".join(
            f"{law.status:8} {law.name:22} "
            + (law.reason or f"error {law.error:.1e} (tolerance {law.tolerance:.0e})")
            + (f"\n{'':9}{law.statement}" if law.status == "BROKEN" else "")
            for law in self.laws
        )


class BrokenLaw(AssertionError):
    """A law of influence fails on this risk and model; the message is the table of all laws."""


def check(
    risk: EmpiricalRisk,
    model: Model,
    *,
    curvature: AbstractCurvature = Hessian(),  # noqa: B008  (frozen)
    trainer: AbstractTrainer | None = None,
    points: int = 8,
    seed: int = 0,
) -> Report:
    """Run the laws that apply to `risk` and `model`, on `points` training points drawn by `seed`.

    *Of the problem:* the loss is finite and repeatable; its gradient agrees with central differences;
    its second derivative is symmetric and agrees with differences of the gradient; the loss's
    `output_hessian` is the one that automatic differentiation finds, and of a convex loss `hessian_root`
    is its root.

    *Of influence* (P2, P3, P4, P5, P8): symmetry, the sign of self-influence, the zero sum, the
    Cauchy–Schwarz bound, the classes.

    A Newton removal (P10) is the step by a curvature that is formed and factored without the point.

    *Against retraining* (P1): with a trainer that reaches a stationary point (`Newton()` by default, up
    to 2,000 parameters), the derivative against re-minimised problems with a point's weight moved up
    and down.

    Points are drawn from the half with the larger gradients: what is fitted to the last digit has
    derivatives of rounding alone.

    **Returns:** a `Report`. **Raises:** `BrokenLaw` (an `AssertionError`) with the table where one
    fails; `ValueError` where risk and model do not fit.
    """
    points, seed = check_whole("points", points), check_whole("seed", seed, least=0)
    check_curvature(curvature)
    if trainer is not None:
        check_trainer(trainer)
    require_concrete("check", risk, model)
    risk = validate(risk, model)
    indices = _drawn(risk, model, points, seed)
    laws = _problem_laws(risk, model, indices, seed)
    if all(law.status != "BROKEN" for law in laws):
        f = _influence(risk, model, curvature, laws)
        laws += _influence_laws(f, indices) + _retraining_laws(f, indices, trainer)
    report = Report(tuple(laws))
    if not report.holds:
        raise BrokenLaw("\n" + str(report))
    return report


def _drawn(risk: EmpiricalRisk, model: Model, points: int, seed: int) -> Int[Array, " k"]:
    sizes = np.asarray(map_gradients(lambda _, g: jnp.linalg.norm(g), risk, model))
    half = max(points, (risk.n + 1) // 2)
    # NaN sorts last, with the largest: a broken point is not to be missed.
    steepest = np.argsort(sizes, kind="stable")[-half:]
    chosen = np.random.default_rng(seed).permutation(steepest)[:points]
    return jnp.asarray(np.sort(chosen))


def _influence(risk, model, curvature, laws) -> Influence:
    try:
        return influence(risk, model, curvature)
    except ValueError as error:
        raise ValueError(
            f"The laws of the problem itself hold:\n{Report(tuple(laws))}\nBut there is no influence to "
            f"check: {error} Pass it as `check(risk, model, curvature=...)`."
        ) from error


def _relative(got, expected, beside=0.0) -> float:
    """max |got − expected| over max |expected|, or over max |beside| if that is larger; NaN counts as a
    failure (infinite)."""
    got, expected = np.asarray(got), np.asarray(expected)
    least = np.nan_to_num(np.asarray(beside), nan=0.0, posinf=0.0, neginf=0.0)
    sizes = np.max(np.abs(expected)), np.max(np.abs(least)), np.finfo(got.dtype).tiny
    scale = float(max(sizes))
    error = float(np.max(np.abs(got - expected))) / scale
    return error if np.isfinite(error) else np.inf


def _tolerances(dtype) -> tuple[float, float, float]:
    """Step of a central difference, its tolerance, and that of an algebraic identity."""
    eps = float(jnp.finfo(dtype).eps)
    return eps ** (1 / 3), 10 * eps ** (1 / 3), 1e5 * eps


def _problem_laws(risk, model, indices, seed) -> list[Law]:
    theta, rebuild = ravel(model)
    _, _, identity = _tolerances(theta.dtype)
    data = take(risk.data, indices)
    u, v = jr.normal(jr.key(seed), (2, theta.size), theta.dtype)
    u, v = u / jnp.linalg.norm(u), v / jnp.linalg.norm(v)
    losses = eqx.filter_jit(lambda t: risk.losses(rebuild(t), data))
    slopes = eqx.filter_jit(
        lambda t: jax.vmap(lambda z: example_gradient(risk, rebuild(t), z))(data)
    )
    gradient = jax.grad(lambda t: jnp.mean(risk.losses(rebuild(t), data)))
    product = eqx.filter_jit(lambda t, w: jax.jvp(gradient, (t,), (w,))[1])
    values, rows = losses(theta), slopes(theta)
    if not bool(jnp.all(jnp.isfinite(values)) & jnp.all(jnp.isfinite(rows))):
        bad = np.asarray(indices)[
            ~np.isfinite(np.asarray(values)) | ~np.isfinite(np.asarray(rows)).all(axis=1)
        ]
        return [
            Law("finite", f"Losses and gradients are finite; not at {bad.tolist()}.", np.inf, 0)
        ]
    again = losses(theta)
    Hu, Hv = product(theta, u), product(theta, v)
    of_all = jax.grad(lambda t: jnp.mean(risk.losses(rebuild(t))))
    usual = _FITTED * jnp.linalg.norm(
        eqx.filter_jit(lambda t: jax.jvp(of_all, (t,), (u,))[1])(theta)
    )
    scale = jnp.maximum(jnp.linalg.norm(Hu) + jnp.linalg.norm(Hv), usual)
    return [
        Law("finite", "Losses and gradients are finite.", 0.0, 0.0),
        Law("repeatable", "A loss has one value.", _relative(again, values), 0.0),
        _gradient_law(risk, model, data, values, rows, u),
        _curvature_law(theta, gradient, u, Hu, usual),
        Law(
            "symmetric Hessian",
            "uᵀ∇²ℓ v = vᵀ∇²ℓ u.",
            float(jnp.abs(jnp.vdot(u, Hv) - jnp.vdot(v, Hu)) / scale),
            identity,
        ),
        *_output_laws(risk, model, data, identity),
    ]


def _gradient_law(risk: EmpiricalRisk, model: Model, data, values, rows, u) -> Law:
    theta, rebuild = ravel(model)
    step, tolerance, _ = _tolerances(theta.dtype)

    @eqx.filter_jit
    def central(directions, lengths):
        """The central difference of each example's loss along its own direction, a length wide."""
        loss = lambda move, z: risk.example_loss(rebuild(theta + move), z)
        h = (step * lengths)[:, None]
        ahead, behind = (jax.vmap(loss)(sign * h * directions, data) for sign in (1, -1))
        return (ahead - behind) / (2 * h[:, 0])

    def errors(directions, lengths):
        """Of the slope against the difference, and of two differences against each other."""
        slope, wide = jnp.sum(rows * directions, axis=1), central(directions, lengths)
        far = lambda other: float(jnp.linalg.norm(other - wide) / jnp.linalg.norm(wide))
        return far(slope), far(central(directions, lengths / 2))

    # The length on which a loss changes by as much as itself, along its gradient.
    sizes = jnp.linalg.norm(rows, axis=1)
    sizes = jnp.where(sizes == 0, 1, sizes)
    reach = jnp.maximum(1, jnp.linalg.norm(theta))
    lengths = jnp.clip(jnp.abs(values) / sizes, step * reach, reach)
    along, across = rows / sizes[:, None], jnp.broadcast_to(u, rows.shape)
    name = "gradient"
    statement = "∇ℓ·u is the central difference of ℓ: a wrong custom derivative breaks it."
    clear = [
        error
        for error, noise in (errors(along, lengths), errors(across, lengths))
        if noise <= tolerance / 2
    ]
    if not clear:
        return Law(name, statement, np.nan, 0, "differences of ℓ drown in rounding or kinks here")
    return Law(name, statement, max(clear), tolerance)


def _curvature_law(theta, gradient, u, Hu, usual) -> Law:
    name, statement = "second derivative", "∇²ℓ u is the central difference of ∇ℓ."
    if theta.dtype != jnp.float64:  # a step wide enough for float32 crosses the kinks of a ReLU
        return Law(name, statement, np.nan, 0, "differences of gradients need float64")
    step, tolerance, _ = _tolerances(theta.dtype)
    reach = jnp.maximum(1, jnp.linalg.norm(theta))
    central = lambda h: (gradient(theta + h * u) - gradient(theta - h * u)) / (2 * h)
    wide, narrow = central(step * reach), central(step * reach / 8)
    size = jnp.maximum(jnp.linalg.norm(Hu), usual)
    if float(jnp.linalg.norm(wide - narrow) / size) > tolerance:
        return Law(name, statement, np.nan, 0, "a gradient jumps close to this model (ReLU?)")
    return Law(name, statement, float(jnp.linalg.norm(Hu - wide) / size), tolerance)


def _output_laws(risk: EmpiricalRisk, model: Model, data, tolerance: float) -> list[Law]:
    laws = {
        "output Hessian": "loss.output_hessian is ∇²ℓ in the output.",
        "Hessian root": "UᵀU is ∇²ℓ in the output, U = loss.hessian_root.",
    }
    skipped = lambda name, why: Law(name, laws[name], np.nan, 0, why)
    shape = risk.output_struct(model)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        return [skipped(name, "the output is not one array") for name in laws]

    @eqx.filter_jit
    def claimed_and_found(claim):
        def one(x, y):
            output = risk.output(model, x)
            flat = lambda o: risk.loss(o.reshape(output.shape), y)
            at = output.reshape(-1)
            return claim(output, y), jax.hessian(flat)(at), jax.hessian(flat)(0 * at)

        return jax.vmap(one)(*data)

    def square(output, y):
        root = risk.loss.hessian_root(output, y).reshape(-1, output.size)
        return dot(root.T, root)

    def law(name, claim):
        claimed, found, at_zero = claimed_and_found(claim)
        return Law(name, laws[name], _relative(claimed, found, _FITTED * at_zero), tolerance)

    return [
        law("output Hessian", risk.loss.output_hessian),
        law("Hessian root", square)
        if risk.loss.convex
        else skipped("Hessian root", "the loss is not known to be convex"),
    ]


def _influence_laws(f: Influence, indices) -> list[Law]:
    theta, rebuild = ravel(f.model)
    _, _, identity = _tolerances(theta.dtype)
    data = take(f.risk.data, indices)
    scores = f(data)
    own = self_influence(f)
    size = jnp.sqrt(-own)
    queries = size[indices]
    with jax.numpy_rank_promotion("allow"):
        bound = queries[:, None] * size[None, :]
        excess = jnp.max(jnp.abs(scores) - bound) / jnp.max(size) ** 2
    gradients = jax.vmap(lambda z: example_gradient(f.risk, f.model, z))(data)
    penalty = jax.grad(lambda t: f.risk.regulariser(rebuild(t)))(theta)
    total = f.risk.n * (penalty - risk_gradient(f.risk, f.model))
    sums = jax.vmap(lambda x: jnp.vdot(x, total))(f.response.solve(gradients))
    spread = jnp.sum(jnp.abs(scores) * f.risk.weights[None, :], axis=1)
    zero_sum = jnp.max(jnp.abs(scores @ f.risk.weights - sums) / spread)
    pairs = scores[:, indices]
    return [
        Law("P2 symmetry", "I(i; ℓ_j) = I(j; ℓ_i).", _relative(pairs, pairs.T), identity),
        Law(
            "P3 self-influence",
            "I(i; ℓ_i) = −s_i ≤ 0.",
            max(_relative(jnp.diagonal(pairs), own[indices]), float(jnp.max(own) > 0)),
            identity,
        ),
        Law("P4 zero sum", "Σ w_i I(i; m) = n ∇mᵀH⁻¹(∇Ω − ∇J).", float(zero_sum), identity),
        Law("P5 bound", "|I(i; m)| ≤ √s_i √(∇mᵀH⁻¹∇m).", max(0.0, float(excess)), identity),
        _class_law(f, data, identity),
        _newton_law(f, indices),
    ]


def _class_law(f: Influence, data, tolerance: float) -> Law:
    name, statement = "P8 classes", "Σ_c I(i; p_c) = 0."
    try:
        class_logits_shape(f.risk, f.model)
    except ValueError:
        return Law(name, statement, np.nan, 0, "the loss is not one classifier's")
    probabilities = classification(f, "probability")(data)
    total = jnp.max(jnp.abs(jnp.sum(probabilities, axis=1)))
    return Law(name, statement, float(total / jnp.max(jnp.abs(probabilities))), tolerance)


def _newton_law(f: Influence, indices) -> Law:
    name = "P10 Newton removal"
    statement = "m(θ̂ + Δᵢ) − m(θ̂ + δ₀), Δᵢ = −(H₋ᵢ + λI)⁻¹∇J₋ᵢ, H₋ᵢ formed without the point."
    skipped = lambda why: Law(name, statement, np.nan, 0, why)
    theta, rebuild = ravel(f.model)
    if theta.dtype != jnp.float64 or theta.size > _MOST_PARAMETERS or f.risk.n == 1:
        return skipped(
            f"it takes float64, at most {_MOST_PARAMETERS:,} parameters, and another point"
        )
    try:
        f.response.check_displace()
    except ValueError:
        return skipped("the curvature has no Newton removal")
    some, queries = indices[: min(4, indices.size)], take(f.risk.data, indices)
    curvature = implicit_response(f.response, "check").curvature
    losses = eqx.filter_jit(lambda step: f.risk.losses(rebuild(theta + step), queries))
    settled, wanted = losses(f.response.settle()), []
    try:
        for i in some:
            without = f.risk.with_weights(f.risk.weights.at[i].set(0))
            factored = curvature.factor(without, f.model)
            wanted.append(losses(-factored.solve(risk_gradient(without, f.model))) - settled)
        found = removal(f, "newton")(queries)[:, some].T
    except (ValueError, RuntimeError):  # indefinite: there is no such step
        return skipped("without one of these points the curvature is not positive definite")
    return Law(name, statement, _relative(found, jnp.stack(wanted)), 1e-6)


def _retraining_laws(f: Influence, indices, trainer: AbstractTrainer | None) -> list[Law]:
    theta, _ = ravel(f.model)
    name = "P1 first order"
    statement = "n (m(w + δwᵢeᵢ) − m(w − δwᵢeᵢ))/2δ = wᵢ I(i; m)."
    reason = _no_retraining(f, theta, trainer)
    if reason:
        return [Law(name, statement, np.nan, 0, reason)]
    trainer = Newton() if trainer is None else trainer
    queries, some = take(f.risk.data, indices), indices[: min(4, indices.size)]
    unit = jnp.eye(f.risk.n, dtype=theta.dtype)[some]

    def losses(whole):
        return jax.vmap(lambda z: f.risk.loss(f.risk.predict(whole, z[0]), z[1]))(queries)

    def retrained(masks):
        return leave_subset_out(f.risk, f.model, trainer, masks=masks, outcome=losses)

    delta = 0.05
    slopes = (retrained(1 + delta * unit) - retrained(1 - delta * unit)) / (2 * delta)
    expected = -removal(f, "first-order")(queries)[:, some].T
    return [Law(name, statement, _relative(slopes, expected), 1e-2)]


def _no_retraining(f: Influence, theta, trainer) -> str:
    if theta.dtype != jnp.float64:
        return "differences of retrained models need float64"
    if trainer is None and theta.size > _MOST_PARAMETERS:
        return f"more than {_MOST_PARAMETERS:,} parameters: pass `trainer=`"
    slope = float(jnp.linalg.norm(risk_gradient(f.risk, f.model)))
    if slope > 1e-8:
        return f"the model is not at a stationary point (|grad J| = {slope:.1e})"
    return ""
