"""One linear use of a parameter, and how it is read: activations in, cotangents out."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
from jaxtyping import Array

from .view import View


@dataclass(frozen=True)
class Tap:
    """A place of the program that is linear in a parameter W: out[s, t, :] = W[s] a[s, t, :].

    s runs over independent matrices (groups of a convolution, stacked layers), t over the places where
    a matrix is shared. The gradient of anything in W[s] is Σ_t g[s, t] a[s, t]ᵀ, g its cotangent at
    `out`.

    - `key`: a number of its own, in the order of the program
    - `view`: W as the program sees it; `axes`, `matrix_shape`: how that becomes [S, l, r]
    - `activation`: the operation's operands ↦ a, [S, T, r], or whole numbers [S, T] where `indexed`:
      the places of one-hot rows
    - `cotangent`: an array like the operation's output ↦ [S, T, l]
    - `struct`: shape and dtype of that output
    - `output`: activations and operands ↦ that output, taken in place of the operation; `None` for none
    """

    key: int
    view: View
    axes: tuple[int, ...]
    matrix_shape: tuple[int, int, int]
    activation: Callable[[Sequence[Array]], Array]
    cotangent: Callable[[Array], Array]
    struct: jax.ShapeDtypeStruct
    indexed: bool = False
    output: Callable[[Array, Sequence[Array]], Array] | None = None

    def matrix(self, leaf):
        """The parameter leaf, an array of NumPy or JAX, as matrices [S, l, r]."""
        _, l, r = self.matrix_shape
        return self.view.transpose(self.axes).apply(leaf).reshape(-1, l, r)

    def scanned(self, length: int, depth: int) -> "Tap":
        """The same tap seen from outside a scan of `length` steps: as more matrices where the scan runs
        over the parameter, else as more places of the same one."""
        join = _more_matrices if depth in self.view.scans else _more_places
        cotangent = self.cotangent
        struct = jax.ShapeDtypeStruct((length, *self.struct.shape), self.struct.dtype)
        read = lambda g: join(jax.vmap(cotangent)(g))
        return dataclasses.replace(self, cotangent=read, struct=struct)

    def gather_steps(self, activations: Array, depth: int) -> Array:
        """The activations of all steps of a scan, [L, S, T, …], as those of the tap outside."""
        join = _more_matrices if depth in self.view.scans else _more_places
        return join(activations)


def _more_matrices(rows: Array) -> Array:
    """[L, S, T, …] ↦ [L·S, T, …]."""
    return rows.reshape(-1, *rows.shape[2:])


def _more_places(rows: Array) -> Array:
    """[L, S, T, …] ↦ [S, L·T, …]."""
    moved = rows.swapaxes(0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])
