"""The parameters without a point: one Newton step (P10), then chord steps."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._chunks import map_blocks
from .._cost import cost_of
from .._gradients import risk_gradient
from .._linalg import ravel
from .base import AbstractResponse


class Without(eqx.Module):
    """θ̃ᵢ − θ̂, where training without point i is predicted to end.

    A Newton step Δθᵢ, then chord steps θ̃ ← θ̃ − (H + λI)⁻¹∇J₋ᵢ(θ̃), all with the one H that is held. Each
    takes the error times I − (H + λI)⁻¹∇²J₋ᵢ, small near a minimum where H is the Hessian. Where they
    converge it is to ∇J₋ᵢ = 0, whatever H and λ are.

    `growth` is what the weights of the others grow by once i is gone: 1 where it is erased, W/(W − wᵢ)
    with W = Σw where the mean is over the others alone.
    """

    response: AbstractResponse
    growth: Float[Array, " n"]
    drift: Float[Array, " P"] | None

    def __init__(self, response: AbstractResponse, renormalise: bool = False):
        self.response, weights = response, response.risk.weights
        self.growth = _growth(weights) if renormalise else jnp.ones_like(weights)
        self.drift = _drift(response) if renormalise else None

    def steps(
        self, indices: Int[Array, " k"], refine: Array | int
    ) -> tuple[Float[Array, "k P"], Bool[Array, " k"]]:
        """θ̃ᵢ − θ̂ after `refine` chord steps, and whether these converge: Newton's decrement gᵀH⁻¹g, for
        g = ∇J₋ᵢ(θ̃), falls, or is less than J₋ᵢ's last digit shows."""
        steps = self.response.displace(indices)
        if self.drift is not None:
            steps = steps + (1 - 1 / self.growth[indices])[:, None] * self.drift[None]
        return self._chords(steps, lambda at: self.slopes(indices, at), refine)

    def converged(self, indices: Int[Array, " k"], refine: Array | int) -> Float[Array, "k P"]:
        """`steps`, an error where their chord steps do not converge."""
        steps, converge = self.steps(indices, refine)
        return eqx.error_if(
            steps,
            ~jnp.all(converge),
            "Chord steps without one of the training points do not converge: the curvature is too far "
            "from the Hessian there. Use Hessian(), more `damping=`, or `refine=0`; `leave_one_out` "
            "retrains.",
        )

    def mapped(self, block: Callable[[Int[Array, " k"]], PyTree[Array]]) -> PyTree[Array]:
        """`block` of all points' indices, as many at a time as its program holds in memory."""
        index = jnp.zeros((), jnp.arange(0).dtype)
        cost = cost_of(lambda _, i: block(i[None]), index, index)
        dtype = self.growth.dtype
        items = int(cost.live.point / dtype.itemsize)
        return map_blocks(block, self.growth.size, self.response.limits.rows(items, dtype))

    def settled(self, refine: Array | int) -> Float[Array, " P"]:
        """The same with every point kept: what is left of training, 0 at a stationary point (P10d)."""
        slope = lambda at: _slope(self.response, at[0], self.response.risk.weights)[None]
        return self._chords(self.response.settle()[None], slope, refine)[0][0]

    def slopes(self, indices: Int[Array, " k"], steps: Float[Array, "k P"]) -> Float[Array, "k P"]:
        """∇J₋ᵢ(θ̂ + stepᵢ)."""
        weights = self.response.risk.weights
        without = lambda i: self.growth[i] * weights.at[i].set(0)
        return jax.vmap(lambda i, at: _slope(self.response, at, without(i)))(indices, steps)

    def _chords(self, steps, slopes, refine):
        def chord(_, state):
            steps, _, decrement = state
            slope = slopes(steps)
            down = self.response.solve(slope)
            return steps - down, decrement, jnp.sum(slope * down, axis=1)

        unknown = jnp.full(len(steps), jnp.inf, steps.dtype)
        steps, before, decrement = jax.lax.fori_loop(0, refine, chord, (steps, unknown, unknown))
        digit = jnp.finfo(steps.dtype).eps * jnp.abs(
            self.response.risk.objective(self.response.model)
        )
        # No order holds of NaN, so that a step that is none does not converge.
        finite = jnp.isfinite(jnp.sum(steps, axis=1))
        return steps, finite & (jnp.abs(decrement) <= jnp.maximum(jnp.abs(before), digit))


def _slope(response: AbstractResponse, step, weights) -> Float[Array, " P"]:
    theta, rebuild = ravel(response.model)
    return risk_gradient(response.risk, rebuild(theta + step), weights)


def _growth(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """W/(W − wᵢ). The others are summed from both ends, since W − wᵢ cancels."""
    before = lambda w: jnp.concatenate([jnp.zeros_like(w[:1]), jnp.cumsum(w)[:-1]])
    others = before(weights) + before(weights[::-1])[::-1]
    return jnp.where(weights > 0, (others + weights) / others, 1)


def _drift(response: AbstractResponse) -> Float[Array, " P"]:
    """H⁻¹∇Ω: where the model moves to first order, as the weights of all points grow.

    J₋ᵢ(θ, s·w) has the minimiser of J₋ᵢ(θ, w) − (1 − 1/s) Ω(θ)."""
    theta, _ = ravel(response.model)
    return response.solve((response.risk.l2_vector(response.model) * theta)[None])[0]
