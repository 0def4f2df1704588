"""Jacobians of any model, a row by a reverse pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._chunks import chunk_length, chunked_map, chunked_sum, leading_length, take
from .._custom_types import Model
from .._linalg import dot, einsum, ravel
from .._risk import EmpiricalRisk
from .affine import is_affine
from .base import AbstractJacobian, form_from_above


class OutputJacobian(AbstractJacobian):
    """Jacobians by reverse mode, recomputed chunk by chunk: any model, no [n, K, P] array kept."""

    risk: EmpiricalRisk
    model: Model
    inputs: PyTree[Array]

    @property
    def examples(self):
        return leading_length(self.inputs)

    @property
    def affine(self):
        return is_affine(self.risk, self.model)

    @property
    def closed_form(self):
        return False

    @property
    def outputs(self):
        theta, _ = ravel(self.model)
        return jax.eval_shape(self._output, theta, take(self.inputs, 0)).size

    @property
    def length(self):
        return ravel(self.model)[0].size

    @property
    def summed(self):
        return self.examples * self.outputs

    def _output(self, theta, x):
        _, rebuild = ravel(self.model)
        return self.risk.output(rebuild(theta), x).reshape(-1)

    def rows(self, x: PyTree[Array]) -> Float[Array, "K P"]:
        theta, _ = ravel(self.model)
        return jax.jacrev(self._output)(theta, x)

    def _chunk(self) -> int:
        theta, _ = ravel(self.model)
        return chunk_length(2 * self.outputs * theta.size, theta.dtype)

    def _map(self, fn, *others):
        return chunked_map(lambda args: fn(*args), (self.inputs, *others), self._chunk())

    def gram(self, middle):
        def block(args):
            A = jax.vmap(self.rows)(args[0])
            SA = einsum("nkl,nlp->nkp", args[1], A)
            P = A.shape[-1]
            return dot(A.reshape(-1, P).T, SA.reshape(-1, P))

        return chunked_sum(block, (self.inputs, middle), self._chunk())

    def sandwich(self, matrix):
        def one(x):
            A = self.rows(x)
            return dot(dot(A, matrix), A.T)

        return self._map(one)

    def outer(self):
        def one(x):
            A = self.rows(x)
            return dot(A, A.T)

        return self._map(one)

    def dense(self):
        return self._map(self.rows)

    def norms(self):
        # ‖A‖₂⁸ = ‖(AAᵀ)⁴‖₂ ≤ ‖(AAᵀ)⁴‖_∞. Not by eigenvalues: two batches of them in one program may
        # each hold a thread and wait for another.
        outer = self.outer()
        size = jnp.sqrt(jnp.sum(jnp.square(outer), axis=(1, 2)))  # Frobenius: no power overflows
        unit = outer / jnp.where(size == 0, 1, size)[:, None, None]
        fourth = jnp.linalg.matrix_power(unit, 4)
        largest = jnp.max(jnp.sum(jnp.abs(fourth), axis=2), axis=1)
        rounding = 1 + 64 * self.outputs * jnp.finfo(outer.dtype).eps
        return jnp.sqrt(size * largest**0.25) * rounding

    def absolute_norms(self):
        return jnp.sqrt(jnp.trace(self.outer(), axis1=1, axis2=2))

    def pull(self, u):
        theta, _ = ravel(self.model)
        vjp = lambda x, ui: jax.vjp(lambda t: self._output(t, x), theta)[1](ui)[0]
        return self._map(vjp, u)

    def push(self, v):
        theta, _ = ravel(self.model)
        return self._map(lambda x: jax.jvp(lambda t: self._output(t, x), (theta,), (v,))[1])

    def push_each(self, v):
        theta, _ = ravel(self.model)
        jvp = lambda x, vi: jax.jvp(lambda t: self._output(t, x), (theta,), (vi,))[1]
        return self._map(jvp, v)

    def energy(self, s):
        unit = jnp.eye(self.outputs, dtype=s.dtype)
        matrix = self.gram(s[:, None, None] * unit[None])
        return lambda rows: form_from_above(matrix, rows[:, None, :], self.summed)

    def take(self, indices):
        return OutputJacobian(self.risk, self.model, take(self.inputs, indices))
