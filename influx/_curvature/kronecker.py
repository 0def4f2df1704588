"""A curvature of one block a layer, diagonal in a basis Q_l ⊗ Q_r: what K-FAC and EK-FAC both are."""

import math
from collections.abc import Sequence
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int

from .._custom_types import Model
from .._linalg import each_times, einsum
from .._taps import Layer, Rows, Rules
from .base import AbstractFactored


class EigenBlock(eqx.Module):
    """H of one layer: (Q_l ⊗ Q_r) diag(values) (Q_l ⊗ Q_r)ᵀ on matrices [S, l, r], ∇²Ω contained.

    A basis of `None` is the identity. `factor_values` are the eigenvalues of the two factors: the mean
    squares of the gradients' factors in the eigenbasis. Scores take 1/(values + λ) as it is, or, within
    a `tolerance`, by `terms`, weights p, q [S, ρ, ·] with Σ_ρ p ⊗ q near it, or only at the coordinates
    `kept` of the S·l·r.
    """

    layer: Layer = eqx.field(static=True)
    left: Float[Array, "S l l"] | None
    right: Float[Array, "S r r"] | None
    values: Float[Array, "S l r"]
    damping: Float[Array, ""]
    factor_values: tuple[Float[Array, "S l"], Float[Array, "S r"]]
    terms: tuple[Float[Array, "S k l"], Float[Array, "S k r"]] | None = None
    kept: Int[Array, " c"] | None = None

    @property
    def inverse(self) -> Float[Array, "S l r"]:
        """The eigenvalues of (H + λI)⁻¹."""
        return 1 / (self.values + self.damping)

    @property
    def scored_inverse(self) -> Float[Array, "S l r"]:
        """What scores take in its place."""
        if self.terms is not None:
            return einsum("sul,sur->slr", *self.terms)
        if self.kept is not None:
            flat = self.inverse.reshape(-1)
            return jnp.zeros_like(flat).at[self.kept].set(flat[self.kept]).reshape(self.layer.shape)
        return self.inverse

    @property
    def products(self) -> int:
        """How many products of two numbers a score of two gradients takes."""
        if self.terms is not None:
            return sum(side.size for side in self.terms)
        return self.layer.size if self.kept is None else self.kept.size

    @property
    def exact(self) -> "EigenBlock":
        """The block without its tolerance."""
        return replace(self, terms=None, kept=None)

    @property
    def missed(self) -> Float[Array, "S l r"]:
        """|R̃ − R|, R the eigenvalues of the inverse and R̃ those that scores take."""
        return jnp.abs(self.scored_inverse - self.inverse)

    @property
    def solve_flops(self) -> float:
        """Both rotations and back, by the bases that are not the identity."""
        sides = [basis.shape[-1] for basis in (self.left, self.right) if basis is not None]
        return self.layer.size * (1.0 + 4.0 * sum(sides))

    def rotate(self, matrix: Float[Array, "*b S l r"]) -> Float[Array, "*b S l r"]:
        """Q_lᵀ V Q_r."""
        return _right(_left(matrix, _transposed(self.left)), self.right)

    def rotate_back(self, matrix: Float[Array, "*b S l r"]) -> Float[Array, "*b S l r"]:
        """Q_l V Q_rᵀ."""
        return _right(_left(matrix, self.left), _transposed(self.right))

    def scaled(self, matrix: Float[Array, "*b S l r"], by) -> Float[Array, "*b S l r"]:
        """Q_l (by ∘ (Q_lᵀ V Q_r)) Q_rᵀ."""
        rotated = self.rotate(matrix)
        return self.rotate_back(rotated * jnp.broadcast_to(by, rotated.shape))

    def rotate_rows(self, rows: Rows) -> Rows:
        """The rows of a gradient in the eigenbasis; one-hot rows only where Q_r is the identity."""
        left = rows.left if self.left is None else each_times(rows.left, self.left)
        right = rows.right if self.right is None else each_times(rows.right, self.right)
        return Rows(left, right)

    def gradient(self, rows: Rows) -> Float[Array, "k S l r"]:
        """The gradient of one example's rows in the eigenbasis: its rows rotated, where they are few."""
        _, l, r = self.layer.shape
        k, places = rows.left.shape[0], rows.left.shape[-2]
        of_rows = places * (k * l * l + rows.right.shape[0] * r * r)
        if not rows.indexed and of_rows <= k * l * r * (l + r):
            return self.rotate_rows(rows).gradient(self.layer.shape)
        return self.rotate(rows.gradient(self.layer.shape))


def _transposed(basis):
    return None if basis is None else basis.swapaxes(-1, -2)


def _left(matrix, basis):
    return matrix if basis is None else einsum("slm,...smr->...slr", basis, matrix)


def _right(matrix, basis):
    return matrix if basis is None else each_times(matrix, basis)


class Kronecker(AbstractFactored):
    """Blocks of layers, each solved with in its eigenbasis: O(l r (l + r)) a layer and solve.

    `shapes` are those of the model's parameter leaves, in the order of `ravel(model)`; `rules` those
    under which the layers were read.
    """

    blocks: tuple[EigenBlock, ...]
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    rules: Rules = eqx.field(static=True)

    @classmethod
    def of(cls, model: Model, blocks: Sequence[EigenBlock], rules: Rules) -> "Kronecker":
        """Blocks of a model's layers."""
        leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
        return cls(tuple(blocks), tuple(leaf.shape for leaf in leaves), rules)

    @property
    def matrix(self):
        return None

    @property
    def layered(self):
        return self

    @property
    def exact(self):
        return replace(self, blocks=tuple(block.exact for block in self.blocks))

    @property
    def dampings(self):
        full = lambda b: jnp.full(b.layer.shape, b.damping, b.values.dtype)
        return self.join([full(b) for b in self.blocks])

    @property
    def matvec(self):
        return lambda v: self._scaled(v, [b.values + b.damping for b in self.blocks])

    @property
    def solve_flops(self):
        return float(sum(b.solve_flops for b in self.blocks))

    def try_solve(self, v):
        return self._scaled(v, [b.inverse for b in self.blocks]), jnp.asarray(True)

    def _scaled(self, v, by: Sequence[Float[Array, "S l r"]]) -> Float[Array, " P"]:
        """v with each block multiplied by its own numbers, in its eigenbasis."""
        parts = zip(self.blocks, self.split(v), by)
        return self.join([block.scaled(V, values) for block, V, values in parts])

    def missed(self, v: Float[Array, " P"]) -> Float[Array, ""]:
        """vᵀ|R̃ − R|v in the eigenbasis: a score by the blocks' terms is off by at most the root of that
        of both its gradients, |uᵀ(R̃ − R)v|² ≤ uᵀ|R̃ − R|u · vᵀ|R̃ − R|v."""
        return jnp.vdot(v, self._scaled(v, [block.missed for block in self.blocks]))

    @property
    def most_missed(self) -> Float[Array, ""]:
        """max |R̃/R − 1|: the same over vᵀRv, for the worst v there is."""
        return jnp.max(jnp.stack([jnp.max(b.missed / b.inverse) for b in self.blocks]))

    def split(self, v: Float[Array, " P"]) -> list[Float[Array, "S l r"]]:
        """A vector of all parameters as the matrices of the layers."""
        leaves, start = [], 0
        for shape in self.shapes:
            size = math.prod(shape)
            leaves.append(v[start : start + size].reshape(shape))
            start += size
        return [block.layer.matrix(leaves) for block in self.blocks]

    def join(self, matrices: Sequence[Float[Array, "S l r"]]) -> Float[Array, " P"]:
        """The inverse of `split`: it moves entries only, so its transpose."""
        total = sum(math.prod(shape) for shape in self.shapes)
        like = jax.ShapeDtypeStruct((total,), matrices[0].dtype)
        return jax.linear_transpose(self.split, like)(list(matrices))[0]
