"""The parameters without a point: one Newton step (P10), then chord steps."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from .._chunks import take
from .._gradients import example_gradient, risk_gradient
from .._linalg import ravel
from .base import AbstractResponse


class Without(eqx.Module):
    """θ̃ᵢ − θ̂, where training without point i is predicted to end.

    First Δθᵢ + (1 − 1/sᵢ)(H + λI)⁻¹∇Ω(θ̂ + δ₀), a Newton step and what growing weights leave of Ω; then
    chord steps θ̃ ← θ̃ − (H + λI)⁻¹∇J₋ᵢ(θ̃), all with the one H that is held. Each takes the error times
    I − (H + λI)⁻¹∇²J₋ᵢ, small near a minimum where H is the Hessian. Where they converge it is to
    ∇J₋ᵢ = 0, whatever H and λ are (P10).

    `growth` sᵢ is what the weights of the others grow by once i is gone: 1 where it is erased,
    W/(W − wᵢ) with W = Σw where the mean is over the others alone.
    """

    response: AbstractResponse
    growth: Float[Array, " n"]
    drift: Float[Array, " P"] | None

    def __init__(self, response: AbstractResponse, renormalise: bool = False):
        self.response, weights = response, response.risk.weights
        self.growth = _growth(weights) if renormalise else jnp.ones_like(weights)
        self.drift = _drift(response) if renormalise else None

    def steps(
        self, indices: Int[Array, " k"], displaced: Float[Array, "k P"], refine: Array | int
    ) -> tuple[Float[Array, "k P"], Bool[Array, " k"]]:
        """θ̃ᵢ − θ̂ after `refine` chord steps, and whether none of them diverges: Newton's decrement
        gᵀH⁻¹g, g = ∇J₋ᵢ, falls from θ̂ on, or is rounding. `displaced` are the Newton steps Δθᵢ.

        A Python number of steps can be differentiated in reverse; an array of one compiles once.
        """
        start = displaced
        if self.drift is not None:
            start = start + (1 - 1 / self.growth[indices])[:, None] * self.drift[None]
        if isinstance(refine, int) and refine == 0:
            return start, jnp.ones(len(indices), bool)
        slopes = lambda steps: self.slopes(indices, steps)
        first = -jnp.sum(self._first_slopes(indices) * start, axis=1)
        return _chords(self.response, slopes, start, first, refine)

    def settled(self, refine: Array | int) -> tuple[Float[Array, " P"], Bool[Array, ""]]:
        """The same with every point kept: what is left of training, 0 at a stationary point (P10d)."""
        start = self.response.settle()
        if isinstance(refine, int) and refine == 0:
            return start, jnp.array(True)
        slopes = lambda steps: _gradient(self.response, steps[0])[None]
        first = -jnp.vdot(_gradient(self.response), start)
        steps, falls = _chords(self.response, slopes, start[None], first[None], refine)
        return steps[0], falls[0]

    def slopes(self, indices: Int[Array, " k"], steps: Float[Array, "k P"]) -> Float[Array, "k P"]:
        """∇J₋ᵢ(θ̂ + stepᵢ)."""
        weights = self.response.risk.weights
        without = lambda i: self.growth[i] * weights.at[i].set(0)
        return jax.vmap(lambda i, at: _gradient(self.response, at, without(i)))(indices, steps)

    def _first_slopes(self, indices: Int[Array, " k"]) -> Float[Array, "k P"]:
        """∇J₋ᵢ(θ̂) = s(∇J − ∇Ω − (wᵢ/n)gᵢ) + ∇Ω, one gradient each."""
        risk, model = self.response.risk, self.response.model
        penalty = _penalty_gradient(self.response)
        data = _gradient(self.response) - penalty
        share = (risk.weights[indices] / risk.n)[:, None]
        own = jax.vmap(lambda z: example_gradient(risk, model, z))(take(risk.data, indices))
        return self.growth[indices, None] * (data[None] - share * own) + penalty[None]


def _chords(
    response: AbstractResponse,
    slopes: Callable,
    start: Float[Array, "k P"],
    first: Float[Array, " k"],
    refine: Array | int,
) -> tuple[Float[Array, "k P"], Bool[Array, " k"]]:
    """Chord steps on from `start`, and whether the decrement falls from `first` on to where they end."""
    noise = _rounding(response)

    def judged(state):
        steps, before, falls = state
        slope = slopes(steps)
        down = response.solve(slope)
        decrement = jnp.abs(jnp.sum(slope * down, axis=1))
        # No order holds of NaN: where there is no step, nothing falls.
        return down, decrement, falls & ((decrement < before) | (decrement <= noise))

    def chord(_, state):
        down, decrement, falls = judged(state)
        return state[0] - down, decrement, falls

    state = start, jnp.abs(first), jnp.ones(len(start), bool)
    end = jax.lax.fori_loop(0, refine, chord, state)
    return end[0], judged(end)[2]


def _rounding(response: AbstractResponse) -> Float[Array, ""]:
    """A decrement ten times as long as rounding makes: that of the difference between ∇J(θ̂) and the same
    summed in reverse, each parameter's last digit moved one way or the other."""
    risk = response.risk
    backwards = eqx.tree_at(
        lambda r: (r.data, r.weights),
        risk,
        jtu.tree_map(lambda x: x[::-1], (risk.data, risk.weights)),
    )
    theta, rebuild = ravel(response.model)
    digits = jnp.finfo(theta.dtype).eps * jnp.where(jnp.arange(theta.size) % 2 == 0, theta, -theta)
    noise = risk_gradient(backwards, rebuild(theta + digits)) - _gradient(response)
    return 100 * jnp.abs(jnp.vdot(noise, response.solve(noise[None])[0]))


def _gradient(
    response: AbstractResponse, step: Array | float = 0.0, weights: Array | None = None
) -> Float[Array, " P"]:
    """∇J(θ̂ + step, w)."""
    theta, rebuild = ravel(response.model)
    return risk_gradient(response.risk, rebuild(theta + step), weights)


def _penalty_gradient(response: AbstractResponse, step: Array | float = 0.0) -> Float[Array, " P"]:
    """∇Ω(θ̂ + step)."""
    theta, _ = ravel(response.model)
    return response.risk.l2_vector(response.model) * (theta + step)


def _growth(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """W/(W − wᵢ). The others are summed from both ends, since W − wᵢ cancels."""
    before = lambda w: jnp.concatenate([jnp.zeros_like(w[:1]), jnp.cumsum(w)[:-1]])
    others = before(weights) + before(weights[::-1])[::-1]
    return jnp.where(weights > 0, (others + weights) / others, 1)


def _drift(response: AbstractResponse) -> Float[Array, " P"]:
    """(H + λI)⁻¹∇Ω(θ̂ + δ₀): where the model moves to first order, as the weights of all points grow.

    J₋ᵢ(θ, s·w) has the minimiser of J₋ᵢ(θ, w) − (1 − 1/s) Ω(θ)."""
    return response.solve(_penalty_gradient(response, response.settle())[None])[0]
