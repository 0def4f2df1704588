"""A function of the model with every linear use of its parameters watched."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, PyTree

from .._custom_types import Model
from .layers import Layer, Rows, Uncovered, layers_of
from .program import Reading, escaping, read, run
from .view import View


class Watched:
    """fn(model, example), whose values and gradients come layer by layer.

    `layers` holds each parameter in one block, `uncovered` those that no rule covers. Reading a
    program costs one trace of it; nothing is kept between traces.
    """

    def __init__(self, fn: Callable[[Model, Any], Array], model: Model, example: PyTree):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        self.leaves, self._structure = jtu.tree_flatten(params)
        paths = [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(params)]
        shapes = [leaf.shape for leaf in self.leaves]

        def flat(leaves, example):
            return fn(eqx.combine(jtu.tree_unflatten(self._structure, leaves), static), example)

        struct = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), example)
        self._closed: ClosedJaxpr = jax.make_jaxpr(flat)(self.leaves, struct)
        program = self._closed.jaxpr
        roles = [View(i, shape) for i, shape in enumerate(shapes)]
        roles += [None] * (len(program.invars) - len(roles))
        self._reading: Reading
        self._reading, outs = read(program, roles, shapes)
        self._reading.escaped |= escaping(outs)
        self.layers: list[Layer]
        self.uncovered: list[Uncovered]
        self.layers, self.uncovered = layers_of(self._reading, paths, shapes)

    def rows(
        self, example: PyTree[Array], cotangents: Callable[[Array], Array]
    ) -> tuple[Array, list[Rows]]:
        """The value for one example, and each layer's gradients for `cotangents(value)` [k, …]."""
        value, parts = self.parts(example, cotangents)
        return value, [layer.rows(part) for layer, part in zip(self.layers, parts)]

    def parts(
        self, example: PyTree[Array], cotangents: Callable[[Array], Array]
    ) -> tuple[Array, list[tuple[Rows, ...]]]:
        """The same, the places that see a layer's matrix transposed apart: see `Layer.parts`."""
        direct = [layer.leaves[0] for layer in self.layers if not layer.taps]

        def shifted(shifts, chosen):
            leaves = list(self.leaves)
            for leaf, x in zip(direct, chosen):
                leaves[leaf] = x
            inputs = [*leaves, *jtu.tree_leaves(example)]
            outs, seen = run(self._closed.jaxpr, self._reading, self._closed.consts, inputs, shifts)
            return outs[0], seen

        zeros = [jnp.zeros(tap.struct.shape, tap.struct.dtype) for tap in self._reading.taps]
        chosen = [self.leaves[leaf] for leaf in direct]
        value, pull, seen = jax.vjp(shifted, zeros, chosen, has_aux=True)
        by_tap, by_leaf = jax.vmap(pull)(cotangents(value))
        taps = self._reading.taps
        activations = {tap.key: a for tap, a in zip(taps, seen)}
        made = {tap.key: jax.vmap(tap.cotangent)(g) for tap, g in zip(taps, by_tap)}
        gradients = dict(zip(direct, by_leaf))
        return value, [layer.parts(activations, made, gradients) for layer in self.layers]
