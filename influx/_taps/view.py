"""What the analysis of a program knows of a variable that holds a parameter, or a layer's output."""

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class View:
    """One parameter leaf, its entries moved but neither mixed, repeated nor left out.

    `steps` are the moves: ("transpose", k, axes) or ("reshape", k, shape) of what stands behind the k
    leading axes that scans run over (stacked layers). `scans` are the depths of those scans.
    """

    leaf: int
    shape: tuple[int, ...]
    steps: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    scans: tuple[int, ...] = ()

    def transpose(self, axes) -> "View":
        shape = tuple(self.shape[axis] for axis in axes)
        return self._moved("transpose", tuple(axes), shape)

    def reshape(self, shape) -> "View":
        return self._moved("reshape", tuple(shape), tuple(shape))

    def _moved(self, kind: str, how: tuple[int, ...], shape: tuple[int, ...]) -> "View":
        step = (kind, len(self.scans), how)
        return dataclasses.replace(self, shape=shape, steps=(*self.steps, step))

    def scanned(self, depth: int) -> "View":
        """One slice of the first axis, inside a scan over it."""
        return dataclasses.replace(self, shape=self.shape[1:], scans=(*self.scans, depth))

    def apply(self, leaf):
        """The leaf, an array of NumPy or JAX, as the program sees it, scanned axes in front."""
        for kind, k, how in self.steps:
            if kind == "transpose":
                leaf = leaf.transpose(*range(k), *(k + axis for axis in how))
            else:
                leaf = leaf.reshape(leaf.shape[:k] + how)
        return leaf

    def entries(self, leaf_shape: tuple[int, ...]) -> np.ndarray:
        """At each place of one slice the number of the leaf's entry, counted within the slice."""
        numbers = self.apply(np.arange(int(np.prod(leaf_shape))).reshape(leaf_shape))
        return numbers[(0,) * len(self.scans)]


@dataclass(frozen=True)
class Spread:
    """A parameter leaf repeated along new axes: at each place the number of the leaf's entry."""

    leaf: int
    entries: np.ndarray
    scans: tuple[int, ...] = ()


@dataclass(frozen=True)
class Made:
    """The output of a watched layer: at each place the number of the output feature."""

    tap: int
    features: np.ndarray
    scans: tuple[int, ...] = ()
