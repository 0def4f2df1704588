"""The proximal Bregman response function: what influence estimates where no minimum was reached."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._checks import check_damping, check_indices, require_concrete
from .._custom_types import Model, Scalar, ScalarLike
from .._linalg import ravel
from .._risk import EmpiricalRisk
from .._train import Newton
from .._validate import validate
from .retrain import check_settings, erase, retrain


def pbrf(
    risk: EmpiricalRisk,
    model: Model,
    *,
    indices=None,
    outcome: Callable[[Any], PyTree[Array]] | None = None,
    damping: ScalarLike = 0.0,
    tolerance: float = 1e-10,
    solver: lx.AbstractLinearSolver | None = None,
    chunk_size: int | None = None,
) -> PyTree[Array]:
    r"""Ground truth for networks: the proximal Bregman response to removing each point.

    Row r minimises, from θ̂ = `model` and with i = `indices[r]`,

        (1/n) Σⱼ wⱼ D(θ; zⱼ) − (wᵢ/n) ℓ(zᵢ, θ) + ½ Σ l2 ‖θ − θ̂‖² + ½ λ ‖θ − θ̂‖²,

    where D(θ; z) = ℓ(h, y) − ℓ(ĥ, y) − ∇ₕℓ(ĥ, y)ᵀ(h − ĥ) is the loss's Bregman divergence between the
    outputs h of θ and ĥ of θ̂. Without a point removed its minimum is θ̂ itself, whatever θ̂ is: unlike
    retraining it does not reward finishing the training, nor wander to another minimum. Its
    first-order response is (GGN + l2 + λI)⁻¹ wᵢgᵢ/n, the estimate of `removal(f)` with
    `GaussNewton(damping=λ)`. For a linear model with `SquaredError` at its minimum and λ = 0 it *is*
    leave-one-out retraining.

    **Arguments:** `indices`, `outcome`, `chunk_size` as in `leave_one_out`; `damping` is λ;
    `tolerance` and `solver` those of `Newton`, which minimises it.

    **Returns:** the outcomes, stacked: leaves [k, ...].

    **Raises:** `ValueError` for indices out of range; `RuntimeError` naming the responses that were
    not reached (a larger `damping` makes the objective more convex).

    **Cost:** a minimisation by `Newton` per point, many at a time in one program.

    **Source:** Bae, Ng, Lo, Ghassemi & Grosse, "If Influence Functions are the Answer, Then What is the
    Question?", arXiv:2209.05364.
    """
    require_concrete("pbrf", risk, model)
    risk = validate(risk, model)
    damping = check_damping(damping)
    lanes = check_indices(indices, risk.n)
    trainer = Newton(tolerance, solver=solver)
    check_settings(trainer, outcome, chunk_size)  # before the outputs at θ̂ are computed
    return retrain(
        proximal(risk, model, damping),
        model,
        trainer,
        weigh=erase,
        lanes=lanes,
        typical=risk.weights,
        outcome=outcome,
        chunk_size=chunk_size,
        remedies=f"The tolerance is ‖∇‖ < {tolerance:g}. Raise `damping=`, which makes the objective "
        "more convex (0.1 for a ReLU network), loosen `tolerance=` (float32 gradients stop near 1e-7), "
        "or leave those points out of `indices=`.",
    )


class Proximal(eqx.Module):
    """The proximal Bregman objective as a function of data weights v: wᵢ − vᵢ is what is removed."""

    risk: EmpiricalRisk
    centre: Float[Array, " P"]
    outputs: PyTree[Array]
    slopes: PyTree[Array]
    damping: Scalar

    @property
    def weights(self) -> Float[Array, " n"]:
        return self.risk.weights

    @property
    def whole(self) -> Callable[[Any], Any]:
        return self.risk.whole

    def objective(self, model: Model, weights=None) -> Float[Array, ""]:
        risk = self.risk
        removed = jnp.zeros_like(risk.weights) if weights is None else risk.weights - weights
        losses, linear = jax.vmap(lambda z, h0, slope: self._terms(model, z, h0, slope))(
            risk.data, self.outputs, self.slopes
        )
        theta, _ = ravel(model)
        stiffness = risk.l2_vector(model) + jnp.asarray(self.damping, theta.dtype)
        proximity = 0.5 * jnp.sum(stiffness * jnp.square(theta - self.centre))
        # Σ w (ℓ − linear) − Σ (w − v) ℓ, up to the constant Σ w ℓ(θ̂).
        return risk.mean(losses - linear) - risk.mean(losses, removed) + proximity

    def _terms(self, model, example, output0, slope):
        """ℓ(z, θ) and ∇ₕℓ(ĥ)ᵀ(h − ĥ)."""
        x, y = example
        output = self.risk.output(model, x)
        inner = jtu.tree_map(lambda s, h, h0: jnp.vdot(s, h - h0), slope, output, output0)
        return self.risk.loss(output, y), sum(jtu.tree_leaves(inner))


@eqx.filter_jit
def proximal(risk: EmpiricalRisk, model: Model, damping: Scalar) -> Proximal:
    """The objective around `model`: its outputs, and the loss's slope at each, computed once."""
    inputs, targets = risk.data
    outputs = jax.vmap(lambda x: risk.output(model, x))(inputs)
    slopes = jax.vmap(jax.grad(risk.loss))(outputs, targets)
    return Proximal(risk, ravel(model)[0], outputs, slopes, damping)
