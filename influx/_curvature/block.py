"""Block-diagonal curvature: interactions inside a layer are kept, those between layers dropped."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Int

from .._custom_types import Model
from .._misc import ravel
from .._restriction import restrict
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
        theta, _ = ravel(model)
        parts = [
            (indices, self.curvature.matvec(*restrict(risk, model, where)))
            for indices, where in layers(model)
        ]

        def matvec(v):
            out = jnp.zeros_like(theta)
            for indices, block in parts:
                out = out.at[indices].set(block(v[indices]))
            return out

        return matvec

    def factor(self, risk, model):
        return Blocks(
            tuple(
                Block(indices, self.curvature.factor(*restrict(risk, model, where)))
                for indices, where in layers(model)
            )
        )

    def lower_end(self, risk, model):
        return self.curvature.lower_end(risk, model)

    def newton_steps(self, risk, model, factored, jacobian):
        return None


class Block(eqx.Module):
    indices: Int[np.ndarray, " p"]
    factored: AbstractFactored


class Blocks(AbstractFactored):
    """A block-diagonal curvature: each block solved by itself."""

    blocks: tuple[Block, ...]

    @property
    def matrix(self):
        return None

    @property
    def matvec(self):
        parts = [(block.indices, block.factored.matvec) for block in self.blocks]

        def matvec(v):
            out = jnp.zeros_like(v)
            for indices, part in parts:
                out = out.at[indices].set(part(v[indices]))
            return out

        return matvec

    def try_solve(self, v):
        out, converged = jnp.zeros_like(v), jnp.asarray(True)
        for block in self.blocks:
            x, done = block.factored.try_solve(v[block.indices])
            out, converged = out.at[block.indices].set(x), converged & done
        return out, converged

    def perturbed(self, matvec):
        raise NotImplementedError("A block-diagonal matrix plus another is not block-diagonal.")


def layers(model: Model) -> list[tuple[np.ndarray, Callable]]:
    """For each module that owns parameters: where they stand in `ravel(model)`, and their getter."""
    params = eqx.filter(model, eqx.is_inexact_array)
    groups: dict[str, tuple[list, list]] = {}
    start = 0
    for path, leaf in jtu.tree_leaves_with_path(params):
        paths, places = groups.setdefault(jtu.keystr(path[:-1]), ([], []))
        paths.append(path)
        places.append(np.arange(start, start + leaf.size))
        start += leaf.size
    getter = lambda paths: lambda tree: tuple(_follow(tree, path) for path in paths)
    return [(np.concatenate(places), getter(paths)) for paths, places in groups.values()]


def _follow(tree, path):
    for key in path:
        if isinstance(key, jtu.GetAttrKey):
            tree = getattr(tree, key.name)
        elif isinstance(key, jtu.SequenceKey):
            tree = tree[key.idx]
        else:
            tree = tree[key.key]
    return tree
