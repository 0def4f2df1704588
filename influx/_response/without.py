"""The parameters without a point: one Newton step (P10), then chord steps."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int

from .._chunks import take
from .._gradients import example_gradient, gradient_size, risk_gradient
from .._linalg import ravel
from .base import AbstractResponse

_ROUNDINGS = 8


class Without(eqx.Module):
    """θ̃ᵢ − θ̂, where training without point i is predicted to end.

    First Δθᵢ + (1 − 1/sᵢ)(H + λI)⁻¹∇Ω(θ̂ + δ₀), a Newton step and what growing weights leave of Ω; then
    `refine` chord steps θ̃ ← θ̃ − (H + λI)⁻¹∇J₋ᵢ(θ̃)/sᵢ, all with the one H that is held. Each takes the
    error times I − (H + λI)⁻¹∇²J₋ᵢ/sᵢ, small near a minimum where H is the Hessian. Where they converge
    it is to ∇J₋ᵢ = 0, whatever H and λ are (P10).

    `growth` sᵢ is what the weights of the others grow by once i is gone: 1 where it is erased,
    W/(W − wᵢ) with W = Σw where the mean is over the others alone. A Python number of chord steps can be
    differentiated in reverse; an array of one compiles once.
    """

    response: AbstractResponse
    refine: Array | int
    growth: Float[Array, " n"]
    gradient: Float[Array, " P"]
    left: Float[Array, " P"]
    drift: Float[Array, " P"] | None
    noise: Float[Array, ""] | None

    def __init__(self, response: AbstractResponse, refine: Array | int, renormalise: bool = False):
        weights = response.risk.weights
        self.response, self.refine = response, refine
        self.growth = _growth(weights) if renormalise else jnp.ones_like(weights)
        self.gradient = _gradient(response)
        self.left = response.settle()
        # J₋ᵢ(θ, s·w)/s = J₋ᵢ(θ, w) − (1 − 1/s) Ω(θ).
        slope = _penalty_gradient(response, self.left)[None]
        self.drift = response.solve(slope)[0] if renormalise else None
        self.noise = None if self._unrefined else _rounding(response, self.gradient)

    @property
    def _unrefined(self) -> bool:
        return isinstance(self.refine, int) and self.refine == 0

    def steps(
        self, indices: Int[Array, " k"], displaced: Float[Array, "k P"]
    ) -> tuple[Float[Array, "k P"], Bool[Array, " k"]]:
        """θ̃ᵢ − θ̂, `displaced` being Δθᵢ, and whether no chord step diverges: the squared Newton
        decrement gᵀH⁻¹g, g = ∇J₋ᵢ/sᵢ, falls along each, and ends below that at θ̂; or is rounding.
        """
        response, growth, start = self.response, self.growth[indices, None], displaced
        if self.drift is not None:
            start = start + (1 - 1 / growth) * self.drift[None]
        if self._unrefined:
            return start, jnp.ones(len(indices), bool)
        data, (theta, _) = take(response.risk.data, indices), ravel(response.model)
        own = jax.vmap(lambda z: example_gradient(response.risk, response.model, z))(data)
        share = response.risk.weights[indices, None] / response.risk.n
        penalty = _penalty_gradient(response, jnp.zeros_like(theta))[None]
        first = self.gradient[None] - share * own - (1 - 1 / growth) * penalty
        slopes = lambda steps: self.slopes(indices, steps) / growth
        return self._chords(slopes, start, -jnp.sum(first * start, axis=1))

    def settled(self) -> tuple[Float[Array, " P"], Bool[Array, ""]]:
        """The same with every point kept: what is left of training, 0 at a stationary point (P10d)."""
        if self._unrefined:
            return self.left, jnp.array(True)
        slopes = lambda steps: _gradient(self.response, steps[0])[None]
        first = -jnp.vdot(self.gradient, self.left)
        steps, falls = self._chords(slopes, self.left[None], first[None])
        return steps[0], falls[0]

    def slopes(self, indices: Int[Array, " k"], steps: Float[Array, "k P"]) -> Float[Array, "k P"]:
        """∇J₋ᵢ(θ̂ + stepᵢ)."""
        weights = self.response.risk.weights
        without = lambda i: self.growth[i] * weights.at[i].set(0)
        return jax.vmap(lambda i, at: _gradient(self.response, at, without(i)))(indices, steps)

    def _chords(
        self, slopes: Callable, start: Float[Array, "k P"], first: Float[Array, " k"]
    ) -> tuple[Float[Array, "k P"], Bool[Array, " k"]]:
        """Chord steps on from `start`, and whether they diverge nowhere, `first` being the squared
        decrement at θ̂. Where there is no step to start from (NaN), there are none."""
        below = lambda decrement, other: (decrement < other) | (decrement <= self.noise)

        def judged(state):
            steps, before, falls = state
            down, decrement = _chord(self.response, slopes(steps))
            return down, decrement, falls & below(decrement, before)

        def onward(_, state):
            down, decrement, falls = judged(state)
            return state[0] - down, decrement, falls

        known = jnp.isfinite(jnp.sum(start, axis=1))
        before = jnp.full(len(start), jnp.inf, start.dtype)
        state = jnp.where(known[:, None], start, 0), before, jnp.ones_like(known)
        end = jax.lax.fori_loop(0, self.refine, onward, state)
        _, decrement, falls = judged(end)
        converged = falls & below(decrement, jnp.abs(first))
        return jnp.where(known[:, None], end[0], jnp.nan), converged | ~known


def _chord(response: AbstractResponse, slopes: Float[Array, "k P"]):
    """H⁻¹g and |gᵀH⁻¹g| of each row g."""
    down = response.solve(slopes)
    return down, jnp.abs(jnp.sum(slopes * down, axis=1))


def _rounding(response: AbstractResponse, gradient: Float[Array, " P"]) -> Float[Array, ""]:
    """What rounding makes of a squared decrement, with a factor of 100: the most that is seen of θ̂'s
    last digit and on the way back from it, by chord steps on J − ⟨∇J(θ̂), ·⟩; and of the last digit of
    the sums that ∇J is, up or down at random, of which θ̂'s own says nothing where it is near 0."""
    theta, _ = ravel(response.model)
    unit = jnp.finfo(theta.dtype).eps
    signs = jr.rademacher(jr.key(0), (_ROUNDINGS, theta.size), theta.dtype)
    sums = unit * signs * gradient_size(response.risk, response.model)[None]
    step, found = unit * theta, [jnp.max(_chord(response, sums)[1])]
    for _ in range(4):
        down, decrement = _chord(response, (_gradient(response, step) - gradient)[None])
        step, found = step - down[0], [*found, decrement[0]]
    return 100 * jnp.max(jnp.stack(found))


def _gradient(
    response: AbstractResponse, step: Array | float = 0.0, weights: Array | None = None
) -> Float[Array, " P"]:
    """∇J(θ̂ + step, w)."""
    theta, rebuild = ravel(response.model)
    return risk_gradient(response.risk, rebuild(theta + step), weights)


def _penalty_gradient(response: AbstractResponse, step: Array) -> Float[Array, " P"]:
    """∇Ω(θ̂ + step)."""
    theta, _ = ravel(response.model)
    return response.risk.l2_vector(response.model) * (theta + step)


def _growth(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """W/(W − wᵢ). The others are summed from both ends, since W − wᵢ cancels."""
    before = lambda w: jnp.concatenate([jnp.zeros_like(w[:1]), jnp.cumsum(w)[:-1]])
    others = before(weights) + before(weights[::-1])[::-1]
    return jnp.where(weights > 0, (others + weights) / others, 1)
