"""Layers: every parameter of a model in exactly one matrix-shaped block, read from its uses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._linalg import einsum
from .program import Reading, Use
from .tap import Tap
from .view import View

# A parameter that no linear rule covers gets its exact block up to this size, ...
_EXACT = 1024
# ... and a Kronecker factor is kept as a matrix up to this one, as its diagonal beyond.
_DENSE = 4096


class Rows(NamedTuple):
    """The gradient of a block for one example and k cotangents: Σ_t left[k, s, t] ⊗ right[·, s, t].

    `right` has the cotangents' axis as well where it depends on them, else one of length 1. Where it
    is of whole numbers, [1, S, T], they are the places of one-hot rows.
    """

    left: Float[Array, "k S T l"]
    right: Float[Array, "#k S T r"] | Int[Array, "1 S T"]

    @property
    def indexed(self) -> bool:
        return jnp.issubdtype(self.right.dtype, jnp.integer)

    @property
    def is_rank_one(self) -> bool:
        """Whether the gradient of one example is left ⊗ right: no sum over places."""
        return not self.indexed and self.left.shape[-2] == 1 and self.right.shape[-4] == 1

    def gradient(self, shape: tuple[int, int, int]) -> Float[Array, "k S l r"]:
        """Σ_t left ⊗ right, for a layer of this shape [S, l, r]."""
        if self.indexed:
            _, l, r = shape
            at = lambda i, x: jnp.zeros((r, l), x.dtype).at[i].add(x, mode="drop")
            return jax.vmap(lambda x: jax.vmap(at)(self.right[0], x))(self.left).swapaxes(2, 3)
        k = self.left.shape[0]
        right = jnp.broadcast_to(self.right, (k, *self.right.shape[1:]))
        if k == 1:
            return einsum("kstl,kstr->kslr", self.left, right)
        # XLA is quicker at many small products where a row of the left one lies in one piece. For one
        # cotangent an example that does not pay for the transposition.
        return einsum("kslt,kstr->kslr", self.left.swapaxes(2, 3), right)


@dataclass(frozen=True)
class Layer:
    """One block of parameters as matrices [S, l, r]: a weight with its bias as the last column, or a
    single array.

    - `leaves`: their numbers, and `paths` their names
    - `view`, `axes`: how the weight becomes [S, l, r]; `None` for an array taken as it is
    - `taps`: the taps that use it, and whether each sees the matrix transposed
    - `treatment`: what the curvature makes of it, in words
    - `dense`: whether the left and the right factor are matrices (else diagonals)
    - `rank_one`: whether the gradient of one example is one outer product: one place, not one-hot
    """

    paths: tuple[str, ...]
    leaves: tuple[int, ...]
    shape: tuple[int, int, int]
    treatment: str
    dense: tuple[bool, bool]
    rank_one: bool
    view: View | None = None
    axes: tuple[int, ...] = ()
    taps: tuple[tuple[int, bool], ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def matrix(self, leaves: Sequence[Array]) -> Float[Array, "S l r"]:
        """The layer's parameters, from all leaves of the model."""
        S, l, r = self.shape
        weight = leaves[self.leaves[0]]
        if self.view is None:
            return weight.reshape(S, r, l).swapaxes(1, 2)
        bias = len(self.leaves) - 1
        moved = self.view.transpose(self.axes).apply(weight).reshape(S, l, r - bias)
        if not bias:
            return moved
        return jnp.concatenate([moved, leaves[self.leaves[1]].reshape(S, l, 1)], axis=-1)

    def parts(self, activations, cotangents, gradients) -> tuple[Rows, ...]:
        """The layer's gradient for one example: the rows of the places that see the matrix as it is,
        and, where there are such, those of the places that see it transposed, as rows of the transposed
        gradient. In each, `left` are cotangents and `right` activations.

        `activations[tap]` [S, T, r] or [S, T], `cotangents[tap]` [k, S, T, l]; `gradients[leaf]`
        [k, *shape] of the leaves without taps.
        """
        if not self.taps:
            return (self._direct(gradients[self.leaves[0]]),)
        own = [self._read(activations[key], cotangents[key]) for key, swap in self.taps if not swap]
        turned = [Rows(cotangents[key], activations[key][None]) for key, swap in self.taps if swap]
        _, l, r = self.shape
        return (_joined(own, r), _joined(turned, l)) if turned else (_joined(own, r),)

    def rows(self, parts: tuple[Rows, ...]) -> Rows:
        """All places together, as rows of the gradient of the matrix as it is."""
        if len(parts) == 1:
            return parts[0]
        own, turned = parts
        _, l, r = self.shape
        k = own.left.shape[0]
        own, turned = _spelled_out(own, r, k), _spelled_out(turned, l, k)
        return _joined([own, Rows(turned.right, turned.left)], r)

    def _read(self, a: Array, g: Array) -> Rows:
        if len(self.leaves) > 1:
            a = jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], axis=-1)
        return Rows(g, a[None])

    def _direct(self, gradient: Array) -> Rows:
        S, l, r = self.shape
        left = gradient.reshape(gradient.shape[0], S, r, l)
        if r == 1:
            return Rows(left, jnp.ones((1, S, 1, 1), gradient.dtype))
        return Rows(left, jnp.broadcast_to(jnp.arange(r), (1, S, r)))


def _joined(parts: list[Rows], width: int) -> Rows:
    """The places of all parts, one after the other."""
    if len({part.indexed for part in parts}) > 1:
        parts = [_spelled_out(part, width, 1) for part in parts]
    left = jnp.concatenate([part.left for part in parts], axis=2)
    return Rows(left, jnp.concatenate([part.right for part in parts], axis=2))


def _spelled_out(rows: Rows, width: int, k: int) -> Rows:
    """One-hot rows as such, with the cotangents' axis of length k."""
    right = rows.right
    if rows.indexed:
        right = jax.nn.one_hot(right, width, dtype=rows.left.dtype)
    return Rows(rows.left, jnp.broadcast_to(right, (k, *right.shape[1:])))


@dataclass(frozen=True)
class Uncovered:
    """A parameter that no rule covers, and the operation that uses it."""

    path: str
    shape: tuple[int, ...]
    operation: str


def layers_of(
    reading: Reading, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Layer], list[Uncovered]]:
    """Every leaf in one layer, or among the uncovered."""
    uses = {leaf: [use for use in reading.uses if use.leaf == leaf] for leaf in range(len(shapes))}
    taps = {tap.key: tap for tap in reading.taps}
    biases = _biases(uses, reading.escaped)
    layers, uncovered = [], []
    for leaf, shape in enumerate(shapes):
        if leaf in biases.values():
            continue
        own = [taps[use.tap] for use in uses[leaf] if use.kind == "tap"]
        layer = None
        if own and len(own) == len(uses[leaf]):
            layer = _kronecker(own, leaf, biases.get(leaf), paths, shapes)
        layer = _direct(uses[leaf], leaf, paths[leaf], shape) if layer is None else layer
        if layer is None:
            kinds = [use.kind for use in uses[leaf] if use.kind not in ("tap", "elementwise")]
            uncovered.append(Uncovered(paths[leaf], shape, kinds[0] if kinds else "several"))
        else:
            layers.append(layer)
    return layers, uncovered


def _biases(uses: dict[int, list[Use]], escaped: set[int]) -> dict[int, int]:
    """Weight → bias, where the bias is added to all that the weight makes and to nothing else, and what
    the weight makes is used in no other way."""
    weights = {use.tap: leaf for leaf, some in uses.items() for use in some if use.kind == "tap"}
    found = {}
    for leaf, some in uses.items():
        if not some or any(use.kind != "bias" for use in some):
            continue
        weight = weights[some[0].tap]
        made = sorted(use.tap for use in uses[weight] if use.kind == "tap")
        all_of_it = sorted(use.tap for use in some) == made and not escaped & set(made)
        if all_of_it and weight not in found:
            found[weight] = leaf
    return found


def _kronecker(taps: list[Tap], leaf, bias, paths, shapes) -> Layer | None:
    first = taps[0]
    _, l, r = first.matrix_shape
    S = math.prod(shapes[leaf]) // (l * r)
    looks = [_is_swapped(first, tap, shapes[leaf]) for tap in taps]
    swaps = [look for look in looks if look is not None]
    if len(swaps) < len(taps) or (any(swaps) and bias is not None):
        return None
    indexed = all(tap.indexed for tap in taps) and not any(swaps)
    r = r + (bias is not None)
    places = sum(math.prod(tap.struct.shape) for tap in taps) // (S * l)
    dense = (l <= _DENSE, r <= _DENSE and not indexed)
    return Layer(
        paths=(paths[leaf],) if bias is None else (paths[leaf], paths[bias]),
        leaves=(leaf,) if bias is None else (leaf, bias),
        shape=(S, l, r),
        treatment=_treatment(dense, indexed),
        dense=dense,
        rank_one=places == 1 and not indexed,
        view=first.view,
        axes=first.axes,
        taps=tuple((tap.key, swap) for tap, swap in zip(taps, swaps)),
    )


def _is_swapped(first: Tap, tap: Tap, shape: tuple[int, ...]) -> bool | None:
    """Whether `tap` sees the parameter as `first` does, transposed; `None` if neither so nor alike."""
    if tap is first:
        return False
    number = np.arange(math.prod(shape)).reshape(shape)
    mine, other = first.matrix(number), tap.matrix(number)
    if np.array_equal(mine, other):
        return False
    return True if np.array_equal(mine, other.swapaxes(1, 2)) else None


def _treatment(dense: tuple[bool, bool], indexed: bool) -> str:
    words = ["Kronecker"]
    if indexed:
        words.append("one-hot input")
    elif not dense[1]:
        words.append("diagonal input factor")
    if not dense[0]:
        words.append("diagonal output factor")
    return ", ".join(words)


def _direct(uses: list[Use], leaf: int, path: str, shape: tuple[int, ...]) -> Layer | None:
    """A leaf whose gradients are taken as they are."""
    size = math.prod(shape)
    make = lambda shape, treatment, dense: Layer(
        (path,), (leaf,), shape, treatment, dense, rank_one=shape[2] == 1
    )
    if not uses:
        return make((1, size, 1), "unused", (False, False))
    if size <= _EXACT:
        return make((1, size, 1), "exact", (True, True))
    if any(use.kind not in ("elementwise", "bias") for use in uses):
        return None
    if len(shape) > 1 and shape[-1] <= _DENSE:
        return make((1, shape[-1], size // shape[-1]), "Kronecker, one-hot input", (True, False))
    return make((1, size, 1), "diagonal", (False, True))
