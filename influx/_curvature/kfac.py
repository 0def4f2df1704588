"""Kronecker-factored curvature: K-FAC and EK-FAC of every layer that the program shows."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_damping, is_concrete, is_real, require_concrete
from .._custom_types import Model, Scalar, ScalarLike
from .._jacobian import require_array_output
from .._risk import EmpiricalRisk
from .._taps import Rules, check_rules, checked_rules, ruled
from .auto_damping import auto_damping, rounding_floor
from .base import AbstractCurvature, least_penalty
from .fisher import Fisher
from .ggn import GaussNewton
from .kronecker import EigenBlock, Kronecker
from .kronecker_diagonal import second_moments, with_penalty
from .kronecker_factors import eigenblock, factors
from .low_rank import low_rank
from .truncated import truncated

# To pick coordinates of smaller blocks would save nothing.
_SMALLEST = 1024


class AbstractKroneckerFactored(AbstractCurvature):
    """One block a layer, each diagonal in the eigenbasis of its K-FAC factors. `fisher` says whose
    gradients those are: the matrix that is approximated."""

    fisher: GaussNewton | Fisher
    damping: Any
    tolerance: float = eqx.field(static=True)
    sharing: str = eqx.field(static=True)
    rules: Rules = eqx.field(static=True)

    def __init__(
        self,
        fisher: Literal["ggn", "exact", "sampled", "empirical"] = "ggn",
        *,
        damping: ScalarLike | Literal["auto"] = "auto",
        tolerance: float = 0.0,
        sharing: Literal["expand", "reduce"] = "expand",
        key: PRNGKeyArray | None = None,
        draws: int = 1,
        rules: Mapping[type, Callable] | None = None,
    ):
        if fisher not in ("ggn", "exact", "sampled", "empirical"):
            raise ValueError(
                '`fisher` must be "ggn" (Gauss–Newton), "exact", "sampled" or "empirical", got '
                f"{fisher!r}."
            )
        if fisher == "ggn" and (key is not None or draws != 1):
            raise ValueError(
                '`key` and `draws` are those of fisher="sampled", and "ggn", the default, draws '
                'nothing: leave them out, or write "sampled".'
            )
        self.fisher = GaussNewton() if fisher == "ggn" else Fisher(fisher, key=key, draws=draws)
        self.damping = _checked_damping(damping)
        self.tolerance = _checked_tolerance(tolerance)
        if sharing not in ("expand", "reduce"):
            raise ValueError(f'`sharing` must be "expand" or "reduce", got {sharing!r}.')
        self.sharing = sharing
        self.rules = checked_rules(rules)

    @abc.abstractmethod
    def eigenvalues(
        self, risk: EmpiricalRisk, model: Model, blocks: list[EigenBlock]
    ) -> list[Float[Array, "S l r"]]:
        """Those of the data part in the basis of the blocks, whose `values` are K-FAC's."""

    def blocks(self, risk, model) -> tuple[list[EigenBlock], list[Float[Array, "S l r"]]]:
        """The blocks of H, undamped, and the part of their eigenvalues that is ∇²Ω's."""
        risk = ruled(risk, self.rules)
        require_array_output(risk, model)
        start = [eigenblock(*found) for found in factors(self.fisher, self.sharing, risk, model)]
        values = self.eigenvalues(risk, model, start)
        return with_penalty(risk, model, start, values)

    def matvec(self, risk, model):
        return Kronecker.of(model, self.blocks(risk, model)[0], self.rules).matvec

    def factor(self, risk, model):
        check_rules(risk, model, self.rules)
        blocks, penalties = self.blocks(risk, model)
        if self.damping is None:
            damping = auto_damping(blocks, penalties, risk, model)
        else:
            damping = jnp.asarray(self.damping, blocks[0].values.dtype)
        blocks = [replace(block, damping=damping) for block in blocks]
        blocks = [_checked_positive(*parts) for parts in zip(blocks, penalties)]
        if self.tolerance > 0:
            name = f"{type(self).__name__}(tolerance={self.tolerance})"
            require_concrete(name, blocks, penalties)
            blocks = [_near(*parts, self.tolerance) for parts in zip(blocks, penalties)]
        return Kronecker.of(model, blocks, self.rules)

    def lower_end(self, risk, model):
        return least_penalty(risk, model, 0.0 if self.damping is None else self.damping)

    def newton_steps(self, risk, model, factored, jacobian):
        return None


class KFAC(AbstractKroneckerFactored):
    r"""Kronecker-factored approximate curvature: a layer's block of the Gauss–Newton matrix is G ⊗ A.

    A layer z_t = W a_t (the 1 of a bias appended to a), t running over the places where W is shared,
    answers a cotangent u of the model's output by the gradient Σ_t g_t a_tᵀ, g_t = (∂output/∂z_t)ᵀu.
    With w̄ = Σ wᵢ, and as cotangents of example i a root of its loss's Hessian in the output, Σ_u u uᵀ,

        G = (1/n) Σᵢ wᵢ Σ_u Σ_t g_t g_tᵀ,   A = (1/w̄) Σᵢ wᵢ (1/T) Σ_t a_t a_tᵀ,   H = G ⊗ A + diag(l2).

    **Dropped:** all that couples layers, and within a layer what couples activations with output
    gradients; of a factor of more than 4,096 rows, such as a large table's, all but its diagonal. Exact,
    where W is applied once an example, for one datum and for linear networks with squared error (P13).
    l2 that differs within a layer enters by its diagonal in the eigenbasis.

    **Tied with its transpose:** where the program uses W and Wᵀ (an autoencoder, a table that reads and
    writes tokens) each use τ has a pair of its own, and G ⊗ A is the product with the partial traces of
    Σ_τ G_τ ⊗ A_τ: G = Σ tr(A_τ) G_τ, A = Σ tr(G_τ) A_τ / Σ tr(G_τ) tr(A_τ).

    **Arguments:**

    - `fisher`: the cotangents u. `"ggn"`: of the Gauss–Newton matrix, as above. Those of a Fisher matrix
      (see `Fisher`) are gradients of the loss: `"exact"` at all targets of the model's own distribution,
      `"sampled"` at `draws` of them drawn with `key`, `"empirical"` at the given targets. For influx's
      own losses, "exact" is the same matrix as "ggn" at the same cost; class weights enter it squared,
      and a mean over T places as 1/T², where the Hessian of such a loss has weights and 1/T.
    - `damping`: λ of H + λI, or `"auto"`: the least λ ≥ 0 at which the energy of the trained weights is
      what the data decide of them, n θᵀ(diag l2 + λI)θ ≥ d/(1 + d/N) with the effective dimension
      d = tr F(F + diag l2 + λI)⁻¹ of the data part F and N = Σ wᵢ: MacKay's condition (1992), a point
      counting for one direction. For `SquaredError` each eigendirection counts by the share γ that the
      data decide of it, n Σ γ(l2 + λ)θ² ≥ σ² Σ γ² with the noise's variance σ²: weights without
      curvature say nothing, and a fit without residuals gets no λ. Any other loss is taken for a point's
      negative log-likelihood, a mean over T places for that of one: with a scale of its own, give a
      number. Never less than the rounding of eigenvalues that l2 leaves at 0. Held to retraining in
      `docs/how-to-choose.md`.
    - `tolerance`: relative root mean square error aimed at for a layer's scores, 0 for none: layers
      are then scored at the coordinates of their eigenbasis that outweigh l2 and damping, or, applied
      once an example, by few products of small matrices (P13e), whichever takes fewer products.
      A target, not a bound: met where coordinates of gradients are uncorrelated, independent between
      the two factors, and of the curvature's own second moments (P13e); `self_influence` and the scales
      of `relative` stay exact.
    - `sharing`: `"expand"` takes places of a shared W as independent; `"reduce"` takes the mean
      activation and the summed gradient instead (cheaper, for features that are averaged later).
      Look-ups in a table are expanded either way.
    - `rules`: {layer type: fn(layer, *args)} for layers whose program influx cannot read, such as custom
      kernels: fn computes the same with plain products. See `docs/extending.md`.

    Layers are found in the program, not by their names: matrix products, convolutions, look-ups, their
    biases, sharing by `vmap` or `scan`, tied weights. Parameters of at most 1,024 entries that enter in
    any other way get the exact block of their own; larger ones its diagonal where they are added or
    multiplied entry by entry, else an error. `coverage` lists what each parameter gets.

    **Raises:** `ValueError` for a parameter that no rule covers, a singular block (`RuntimeError` inside
    a trace), factors that are not finite, an unknown setting, `"auto"` where all parameters, or all that
    the data decide, are 0, `key` or `draws` where nothing is drawn, or a loss that is no negative
    log-likelihood with `"exact"`; `RuntimeError` for one whose Hessian in the output is not positive
    semi-definite with `"ggn"`.

    **Cost:** one pass over the data with as many backward passes as cotangents: C − 1 for C classes, at
    each place that has some, as many as outputs for other losses, `draws`, or one; O(l³ + r³) a layer;
    `"auto"` with squared error takes one forward pass more.

    **Source:** Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv:1503.05671; Grosse & Martens (convolutions), arXiv:1602.01407; Eschenhagen et
    al. (weight sharing), arXiv:2311.00636; MacKay, "A practical Bayesian framework for backpropagation
    networks", 1992 (`"auto"`).
    """

    def eigenvalues(self, risk, model, blocks):
        return [block.values for block in blocks]


class EKFAC(AbstractKroneckerFactored):
    r"""K-FAC with its eigenvalues corrected: in the eigenbasis Q_G ⊗ Q_A the true diagonal,

        Λ = (1/n) Σᵢ wᵢ Σ_u (Q_Gᵀ Gᵢ Q_A)²,   Gᵢ = Σ_t g_t a_tᵀ,   H = Q diag(Λ) Qᵀ + diag(l2).

    Of all matrices with these eigenvectors it is the nearest to the layer's block of the Gauss–Newton
    (or Fisher) matrix in Frobenius norm, so never further than K-FAC (P13). Where l2 differs within a
    layer, its diagonal in the eigenbasis stands for it.

    **Arguments and errors:** those of `KFAC`: `fisher`, `damping`, `tolerance` (0.05: scores by few
    products of small matrices, aiming at 5 %), `sharing`, `key` and `draws` of `"sampled"`, `rules`.

    **Cost:** a second pass over the data.

    **Source:** George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis", arXiv:1806.03884; Grosse et al. (influence), arXiv:2308.03296.
    """

    def eigenvalues(self, risk, model, blocks):
        return second_moments(self.fisher, blocks, risk, model)


def _checked_damping(damping: Any) -> Scalar | None:
    if isinstance(damping, str):
        if damping != "auto":
            raise ValueError(f'`damping` must be a number at least 0, or "auto"; got {damping!r}.')
        return None
    return check_damping(damping)


def _checked_tolerance(tolerance: float) -> float:
    if not is_real(tolerance) or not 0 <= tolerance < 1:
        raise ValueError(
            f"`tolerance` is a relative error in [0, 1), got {tolerance!r}. 0 is exact, 0.05 fast."
        )
    return float(tolerance)


def _near(block: EigenBlock, penalties, tolerance: float) -> EigenBlock:
    """The block with its inverse as few terms, where gradients are outer products, or at few
    coordinates: whichever takes fewer products a pair."""
    found = [low_rank(block, tolerance)] if block.layer.rank_one else []
    if block.layer.size >= _SMALLEST:
        found.append(truncated(block, penalties, tolerance))
    return min(found, key=lambda near: near.products, default=block)


def _checked_positive(block: EigenBlock, penalty) -> EigenBlock:
    """The block, where it can be inverted."""
    singular = f"The curvature of {' and '.join(block.layer.paths)} is singular"
    remedy = 'Use a positive damping, or "auto", or an l2 > 0 on every parameter.'
    # "auto" lifts what is 0 to 32 units of rounding: only a damping of the user's can be below one.
    floor = rounding_floor(block.values, penalty, units=1)
    if not is_concrete((block, penalty)):
        lost = ~(jnp.min(block.values) + block.damping > floor)
        return replace(block, values=eqx.error_if(block.values, lost, f"{singular}. {remedy}"))
    low = float(np.min(np.asarray(block.values))) + float(block.damping)
    if not low > floor:
        raise ValueError(f"{singular}: its smallest eigenvalue is {low:.3g}. {remedy}")
    return block
