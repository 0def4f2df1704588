"""Block-diagonal curvature: interactions inside a layer are kept, those between layers dropped."""

from collections.abc import Callable, Mapping

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Int

from .._custom_types import Model
from .._restriction import restrict, selected
from .base import AbstractCurvature, AbstractFactored, check_curvature
from .hessian import Hessian


class BlockDiagonal(AbstractCurvature):
    """The blocks of a curvature that belong to one layer each; all blocks between layers dropped.

    A layer is a module that owns parameter arrays, so that a weight and its bias share a block. Each
    block is that curvature of the risk restricted to the layer (P9a), factored by itself: memory
    Σ P_b² in place of P².
    """

    curvature: AbstractCurvature = eqx.field(default=Hessian(), converter=check_curvature)

    @property
    def damping(self):
        return self.curvature.damping

    def matvec(self, risk, model):
        of_block = lambda where: self.curvature.matvec(*restrict(risk, model, where))
        return _blockwise([(indices, of_block(where)) for indices, where in layers(model)])

    def factor(self, risk, model):
        return Blocks(
            tuple(
                Block(indices, self.curvature.factor(*restrict(risk, model, where)), self)
                for indices, where in layers(model)
            )
        )

    def lower_end(self, risk, model):
        return _lower_end(risk, model, [(where, self.curvature) for _, where in layers(model)])

    def newton_steps(self, risk, model, factored, jacobian):
        return None


class Mixture(AbstractCurvature):
    """A curvature for each part of the model, and nothing between the parts.

    ```python
    influx.Mixture({lambda m: m.norm: influx.GaussNewton()}, influx.EKFAC())
    ```

    Each part's curvature is that of the risk restricted to it (P9a), with its own damping. What is
    exact in a part stays exact there; what couples parts is dropped. Scores are taken from solves, so
    that the `tolerance` of a Kronecker-factored part saves nothing here.

    **Arguments:** `parts`: {where: curvature}, `where` selecting a part of the model as in
    `equinox.tree_at`; `rest`: the curvature of all other parameters.

    **Raises:** `ValueError` for parts that overlap, or select nothing.
    """

    wheres: tuple[Callable, ...] = eqx.field(static=True)
    parts: tuple[AbstractCurvature, ...]
    rest: AbstractCurvature

    def __init__(self, parts: Mapping[Callable, AbstractCurvature], rest: AbstractCurvature):
        if (
            not isinstance(parts, Mapping)
            or not parts
            or not all(callable(where) for where in parts)
        ):
            raise ValueError(
                "`parts` maps functions that select a part of the model to curvatures, for instance "
                f"{{lambda m: m.layers[0]: GaussNewton()}}; got {parts!r}."
            )
        self.wheres = tuple(parts)
        self.parts = tuple(check_curvature(curvature) for curvature in parts.values())
        self.rest = check_curvature(rest)

    @property
    def damping(self):
        return None

    def _selected(self, model: Model):
        """(indices, where, curvature) of every part, the rest included."""
        pieces = [(selected(model, w), w, c) for w, c in zip(self.wheres, self.parts)]
        taken = np.concatenate([indices for indices, _, _ in pieces])
        if np.unique(taken).size < taken.size:
            raise ValueError("The parts of a Mixture overlap: give each parameter one curvature.")
        left = [group for group in _leaves(model) if group[0].size and group[0][0] not in taken]
        if left:
            paths = [path for _, path in left]
            rest = lambda tree: tuple(_follow(tree, path) for path in paths)
            pieces.append((np.concatenate([i for i, _ in left]), rest, self.rest))
        return pieces

    def matvec(self, risk, model):
        pieces = self._selected(model)
        return _blockwise([(i, c.matvec(*restrict(risk, model, where))) for i, where, c in pieces])

    def factor(self, risk, model):
        return Blocks(
            tuple(
                Block(i, c.factor(*restrict(risk, model, where)), c)
                for i, where, c in self._selected(model)
            )
        )

    def lower_end(self, risk, model):
        return _lower_end(risk, model, [(where, c) for _, where, c in self._selected(model)])

    def newton_steps(self, risk, model, factored, jacobian):
        return None


def _blockwise(parts: list[tuple[Int[np.ndarray, " p"], Callable]]) -> Callable:
    """The product with a matrix of blocks, from those with each."""

    def matvec(v):
        out = jnp.zeros_like(v)
        for indices, part in parts:
            out = out.at[indices].set(part(v[indices]))
        return out

    return matvec


def _lower_end(risk, model, parts: list[tuple[Callable, AbstractCurvature]]) -> float | None:
    """The least of the parts' ends: of an approximation, a block's may lie below that of the whole."""
    ends = [curvature.lower_end(*restrict(risk, model, where)) for where, curvature in parts]
    return None if None in ends else min(end for end in ends if end is not None)


class Block(eqx.Module):
    """Some parameters, the curvature that they have, and that curvature factored."""

    indices: Int[np.ndarray, " p"]
    factored: AbstractFactored
    curvature: AbstractCurvature


class Blocks(AbstractFactored):
    """A block-diagonal curvature: each block solved by itself."""

    blocks: tuple[Block, ...]

    @property
    def matrix(self):
        return None

    @property
    def dampings(self):
        found = []
        for block in self.blocks:
            own = block.factored.dampings
            found.append(
                jnp.full(block.indices.shape, block.curvature.damping) if own is None else own
            )
        indices = jnp.concatenate([jnp.asarray(block.indices) for block in self.blocks])
        return jnp.zeros(indices.shape, found[0].dtype).at[indices].set(jnp.concatenate(found))

    @property
    def inverts(self):
        return all(block.factored.inverts for block in self.blocks)

    @property
    def matvec(self):
        return _blockwise([(block.indices, block.factored.matvec) for block in self.blocks])

    @property
    def solve_flops(self):
        parts = [block.factored.solve_flops for block in self.blocks]
        return None if None in parts else sum(part for part in parts if part is not None)

    def try_solve(self, v):
        out, converged = jnp.zeros_like(v), jnp.asarray(True)
        for block in self.blocks:
            x, done = block.factored.try_solve(v[block.indices])
            out, converged = out.at[block.indices].set(x), converged & done
        return out, converged


def layers(model: Model) -> list[tuple[np.ndarray, Callable]]:
    """For each module that owns parameters: where they stand in `ravel(model)`, and their getter."""
    groups: dict[str, tuple[list, list]] = {}
    for indices, path in _leaves(model):
        paths, places = groups.setdefault(jtu.keystr(path[:-1]), ([], []))
        paths.append(path)
        places.append(indices)
    getter = lambda paths: lambda tree: tuple(_follow(tree, path) for path in paths)
    return [(np.concatenate(places), getter(paths)) for paths, places in groups.values()]


def _leaves(model: Model) -> list[tuple[np.ndarray, tuple]]:
    """Each parameter leaf: where it stands in `ravel(model)`, and its path."""
    found, start = [], 0
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array)):
        found.append((np.arange(start, start + leaf.size), path))
        start += leaf.size
    return found


def _follow(tree, path):
    for key in path:
        if isinstance(key, jtu.GetAttrKey):
            tree = getattr(tree, key.name)
        elif isinstance(key, jtu.SequenceKey):
            tree = tree[key.idx]
        else:
            tree = tree[key.key]
    return tree
