from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._checks import check_damping, check_key, check_whole
from .._chunks import chunk_length, chunked_sum
from .._custom_types import Scalar, ScalarLike
from .._gradients import example_gradient
from .._linalg import dot, einsum, ravel
from .._loss import AbstractLoss
from .base import AbstractMatrixCurvature, least_penalty
from .ggn import gauss_newton_matrix, gauss_newton_matvec


def _drawn(loss: AbstractLoss, key, output, given):
    """A target from the model's distribution: a label in the dtype of the given ones, any other number
    as it is, for whole-number targets of a regression are no reason to round."""
    target = loss.draw(key, output)
    return target.astype(given.dtype) if jnp.issubdtype(target.dtype, jnp.integer) else target


class Fisher(AbstractMatrixCurvature):
    """The Fisher matrix by name, plus diag(l2).

    - `"exact"`: (1/n) Σ wᵢ E_{y ~ p(·|xᵢ)}[∇ℓ ∇ℓᵀ], the expectation summed over all targets. For a
      negative log-likelihood in its natural parameters (Martens, arXiv:1412.1193), as influx's own
      losses are, it is the Gauss–Newton matrix; class weights enter it squared, and a mean over T
      places as 1/T²: `GaussNewton` is the one whose inverse influence takes.
    - `"sampled"`: the same expectation over `draws` targets drawn with `key`.
    - `"empirical"`: (1/n) Σ wᵢ gᵢgᵢᵀ at the given targets. It is no approximation of the Hessian
      away from a good fit (Kunstner, Balles & Hennig, arXiv:1905.12558).

    **Raises:** `ValueError` for an unknown kind, `"sampled"` without a key, `draws` of another, a loss
    that is no negative log-likelihood (but for `"empirical"`), a singular matrix, and P² numbers that
    this machine cannot hold.

    **Cost:** one example gradient a target, O(nKP²) (`"exact"`), O(n·draws·P²) or O(nP²) to build; O(P²)
    memory, O(P³) to factor.
    """

    kind: str = eqx.field(static=True)
    damping: Scalar
    key: PRNGKeyArray | None
    draws: int = eqx.field(static=True)

    def __init__(
        self,
        kind: Literal["exact", "sampled", "empirical"] = "exact",
        *,
        damping: ScalarLike = 0.0,
        key: PRNGKeyArray | None = None,
        draws: int = 1,
    ):
        if kind not in ("exact", "sampled", "empirical"):
            raise ValueError(
                f'The kind of Fisher must be "exact", "sampled" or "empirical", got {kind!r}.'
            )
        if kind == "sampled" and key is None:
            raise ValueError('Fisher("sampled") draws labels: give it `key=jax.random.key(0)`.')
        self.kind, self.damping = kind, check_damping(damping)
        self.key = None if key is None else check_key("key", key)
        self.draws = check_whole("draws", draws)
        if kind != "sampled" and self.draws > 1:
            raise ValueError(
                f'`draws` are those of the kind "sampled", and {kind!r} draws nothing: leave out '
                f'`draws={draws}`, or use "sampled" with a `key`.'
            )

    def matvec(self, risk, model):
        if self.kind == "exact":
            fisher = lambda o, _, t: dot(risk.loss.output_fisher(o), t.reshape(-1)).reshape(o.shape)
            return gauss_newton_matvec(risk, model, fisher)

        def matvec(v):
            def block(args):
                data, i, share = args
                G = jax.vmap(lambda z, j: self._gradients(risk, model, z, j))(data, i)
                return einsum("b,bdp,bd->p", share, G, dot(G, v)) / self.draws

            return self._sum(risk, model, block) + risk.l2_vector(model) * v

        return matvec

    def matrix(self, risk, model):
        if self.kind == "exact":
            return gauss_newton_matrix(risk, model, _ExactMiddle(risk.loss))
        return _moment_matrix(self, risk, model)

    def _sum(self, risk, model, block):
        theta, _ = ravel(model)
        examples = (risk.data, jnp.arange(risk.n), risk.weights / risk.n)
        return chunked_sum(block, examples, chunk_length(4 * self.draws * theta.size, theta.dtype))

    def _gradients(self, risk, model, example, i):
        """∇ℓ at the given target, or at `draws` targets drawn for example i: [d, P]."""
        if self.kind == "empirical":
            return example_gradient(risk, model, example)[None]
        assert self.key is not None  # `__init__` has seen to it
        x, y = example
        output = risk.output(model, x)

        def drawn(key):
            return example_gradient(risk, model, (x, _drawn(risk.loss, key, output, y)))

        return jax.vmap(drawn)(jr.split(jr.fold_in(self.key, i), self.draws))

    def cotangents(self, loss: AbstractLoss, output, target, i):
        """Rows u of the output's shape whose Σ u uᵀ is this Fisher's middle factor at example i."""
        if self.kind == "exact":
            return loss.fisher_root(output)
        if self.kind == "empirical":
            return jax.grad(loss)(output, target)[None]
        assert self.key is not None  # `__init__` has seen to it
        keys = jr.split(jr.fold_in(self.key, i), self.draws)

        def drawn(key):
            return jax.grad(loss)(output, _drawn(loss, key, output, target))

        return jax.vmap(drawn)(keys) / jnp.sqrt(jnp.asarray(self.draws, output.dtype))

    def lower_end(self, risk, model):
        return least_penalty(risk, model, self.damping)

    def newton_steps(self, risk, model, factored, jacobian):
        return None


class _ExactMiddle(eqx.Module):
    loss: AbstractLoss

    def __call__(self, output, target):
        return self.loss.output_fisher(output)


@eqx.filter_jit
def _moment_matrix(fisher: Fisher, risk, model):
    """(1/n) Σ wᵢ · mean over draws of ∇ℓ ∇ℓᵀ."""

    def block(args):
        data, i, share = args
        G = jax.vmap(lambda z, j: fisher._gradients(risk, model, z, j))(data, i)
        rows = G.reshape(-1, G.shape[-1])
        weight = jnp.repeat(share / fisher.draws, G.shape[1])
        return dot(rows.T, weight[:, None] * rows)

    return fisher._sum(risk, model, block) + jnp.diag(risk.l2_vector(model))
