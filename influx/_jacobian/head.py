"""The closed form of a linear head's Jacobians (P12)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._chunks import chunk_length, chunked_sum, map_blocks
from .._linalg import dot, einsum
from .base import AbstractJacobian, form_from_above


class HeadJacobian(AbstractJacobian):
    """Aᵢ = I_K ⊗ h̃ᵢᵀ: a linear layer on features h̃ᵢ (the 1 of a bias included), P = K·d.

    Per-example gradients are outer products ε ⊗ h̃ and H = (1/n) Σ S ⊗ h̃h̃ᵀ + l2: nothing of size
    [n, P] or [n, K, P] is needed.

    Leaf after leaf, the flat vector holds K rows of `widths[leaf]` parameters: a weight [K, 64] and a
    bias [K] have widths (64, 1).
    """

    features: Float[Array, "n d"]
    classes: int = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)

    @property
    def examples(self):
        return self.features.shape[0]

    @property
    def outputs(self):
        return self.classes

    @property
    def length(self):
        return self.features.shape[1]

    @property
    def summed(self):
        return self.examples

    @property
    def affine(self):
        return True

    @property
    def closed_form(self):
        return True

    @property
    def _shape(self) -> tuple[int, int]:
        return self.outputs, self.features.shape[1]

    def _chunk(self) -> int:
        return chunk_length(2 * self.outputs * self.features.shape[1], self.features.dtype)

    def split(self, v: Float[Array, "*b P"]) -> Float[Array, "*b K d"]:
        """The parameters of each output, from the flat vectors."""
        ends = self.outputs * np.cumsum(self.widths)
        leaves = jnp.split(v, ends[:-1], axis=-1)
        rows = [x.reshape(*v.shape[:-1], self.outputs, w) for x, w in zip(leaves, self.widths)]
        return jnp.concatenate(rows, axis=-1)

    def _join(self, rows: Float[Array, "*b K d"]) -> Float[Array, "*b P"]:
        """The inverse of `split`."""
        leaves = jnp.split(rows, np.cumsum(self.widths)[:-1], axis=-1)
        return jnp.concatenate([x.reshape(*rows.shape[:-2], -1) for x in leaves], axis=-1)

    def gram(self, middle):
        K, d = self._shape

        def block(args):
            x, S = args
            # For each k one matrix product, (S[:, k, :] ⊗ x)ᵀ x.
            row = lambda s: dot((s[:, :, None] * x[:, None, :]).reshape(-1, K * d).T, x)
            return jax.lax.map(row, jnp.moveaxis(S, 1, 0))

        total = chunked_sum(block, (self.features, middle), self._chunk())
        blocks = total.reshape(K, K, d, d)
        half = self._join(jnp.transpose(blocks, (0, 2, 1, 3)))  # [K, d, P]
        return self._join(jnp.moveaxis(half, 2, 0)).T

    def sandwich(self, matrix):
        K, d = self._shape
        half = self.split(matrix.T)  # [P, K, d]
        blocks = self.split(jnp.moveaxis(half, 0, 2))  # [K, d, K, d]

        def block(places):
            x = self.features[places]

            def row(part):  # part = M[k, :, :, :]
                left = dot(x, part.reshape(d, K * d)).reshape(-1, K, d)
                return einsum("nld,nd->nl", left, x)

            return jnp.moveaxis(jax.lax.map(row, blocks), 0, 1)

        return map_blocks(block, self.examples, self._chunk())

    def outer(self):
        square = jnp.sum(jnp.square(self.features), axis=1)
        return square[:, None, None] * jnp.eye(self.outputs, dtype=square.dtype)[None]

    def dense(self):
        unit = jnp.eye(self.outputs, dtype=self.features.dtype)
        return self._join(unit[None, :, :, None] * self.features[:, None, None, :])

    def norms(self):
        rounding = 1 + (self.length + 4) * jnp.finfo(self.features.dtype).eps
        return jnp.linalg.norm(self.features, axis=1) * rounding

    def absolute_norms(self):
        return self.norms()

    def pull(self, u):
        return self._join(u[:, :, None] * self.features[:, None, :])

    def push(self, v):
        return dot(self.features, self.split(v).T)

    def push_each(self, v):
        return einsum("nkd,nd->nk", self.split(v), self.features)

    def energy(self, s):
        form = dot(self.features.T, s[:, None] * self.features)
        return lambda vectors: form_from_above(form, self.split(vectors), self.summed)

    def take(self, indices):
        return HeadJacobian(self.features[indices], self.classes, self.widths)
