"""The model's outputs as a function of its parameters: the Jacobians Aᵢ = ∂outputᵢ/∂θ, whether the
outputs are affine in θ, and the closed form of a linear head (P12)."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._checks import is_concrete
from ._chunks import chunk_length, chunked_map, chunked_sum, leading_length, map_blocks, take
from ._custom_types import Model
from ._linalg import dot, einsum, ravel
from ._risk import EmpiricalRisk


class AbstractJacobian(eqx.Module):
    """The Jacobians Aᵢ ∈ R^{K×P} of n outputs (flattened to K numbers), behind their products.

    The law: with `A` the dense array [n, K, P],

    ```python
    jacobian.gram(S)     == einsum("nkp,nkl,nlq->pq", A, S, A)
    jacobian.sandwich(M) == einsum("nkp,pq,nlq->nkl", A, M, A)
    jacobian.pull(u)     == einsum("nkp,nk->np", A, u)
    jacobian.push(v)     == einsum("nkp,p->nk", A, v)
    jacobian.energy(s)(V) == einsum("n,kp,ncp,ncq,kq->k", s, V, A, A, V)
    ```
    """

    @property
    @abc.abstractmethod
    def examples(self) -> int:
        """n."""

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """K."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """How many parameters one number of an output can depend on: the most that any row of A holds
        besides zeros."""

    @property
    @abc.abstractmethod
    def summed(self) -> int:
        """How many terms one number of Σᵢ Aᵢᵀuᵢ is a sum of."""

    @property
    @abc.abstractmethod
    def affine(self) -> bool:
        """Whether the outputs are affine in θ, so that A does not depend on it."""

    @property
    @abc.abstractmethod
    def closed_form(self) -> bool:
        """Whether products cost less than forming A."""

    @abc.abstractmethod
    def gram(self, middle: Float[Array, "n K K"]) -> Float[Array, "P P"]:
        """Σᵢ Aᵢᵀ Sᵢ Aᵢ."""

    @abc.abstractmethod
    def sandwich(self, matrix: Float[Array, "P P"]) -> Float[Array, "n K K"]:
        """Aᵢ M Aᵢᵀ."""

    @abc.abstractmethod
    def outer(self) -> Float[Array, "n K K"]:
        """Aᵢ Aᵢᵀ, whose largest eigenvalue is ‖Aᵢ‖₂²."""

    @abc.abstractmethod
    def pull(self, u: Float[Array, "n K"]) -> Float[Array, "n P"]:
        """Aᵢᵀ uᵢ."""

    @abc.abstractmethod
    def push(self, v: Float[Array, " P"]) -> Float[Array, "n K"]:
        """Aᵢ v."""

    @abc.abstractmethod
    def push_each(self, v: Float[Array, "n P"]) -> Float[Array, "n K"]:
        """Aᵢ vᵢ."""

    @abc.abstractmethod
    def energy(self, s: Float[Array, " n"]) -> Callable[[Float[Array, "k P"]], Float[Array, " k"]]:
        """The form v ↦ Σᵢ sᵢ ‖Aᵢv‖², s ≥ 0, on rows v, through its [P, P] (or [d, d]) matrix: not below
        it, whatever rounding does to a form that nearly vanishes at v."""

    @abc.abstractmethod
    def take(self, indices: Int[Array, " k"]) -> "AbstractJacobian":
        """The Jacobians of some of the examples."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "n K P"]:
        """The Jacobians as one array, for few examples."""

    @abc.abstractmethod
    def norms(self) -> Float[Array, " n"]:
        """A bound on ‖Aᵢ‖₂: itself to rounding for a head, else at most K^(1/16) times it."""

    @abc.abstractmethod
    def absolute_norms(self) -> Float[Array, " n"]:
        """A bound on ‖|Aᵢ|‖₂, |A| being A without its signs: what the rounding of Aᵢv and Aᵢᵀu goes by.
        That of |Aᵢ| for a head, else ‖Aᵢ‖_F."""


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
        return lambda rows: _form(matrix, rows[:, None, :], self.summed)

    def take(self, indices):
        return OutputJacobian(self.risk, self.model, take(self.inputs, indices))


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
        return lambda vectors: _form(form, self.split(vectors), self.summed)

    def take(self, indices):
        return HeadJacobian(self.features[indices], self.classes, self.widths)


def _form(
    matrix: Float[Array, "d d"], rows: Float[Array, "k c d"], summed: int
) -> Float[Array, " k"]:
    """Σ_c rows_cᵀ M rows_c from above, M positive semi-definite, each number of it a sum of `summed`
    terms. Where the form vanishes its value is rounding, of size u·tr M·‖rows‖² a term, and of any
    sign."""
    value = jnp.sum(dot(rows, matrix) * rows, axis=(1, 2))
    terms = (summed + 2 * matrix.shape[0] + 16) * jnp.finfo(matrix.dtype).eps / 2
    size = jnp.trace(matrix) * jnp.sum(jnp.square(rows), axis=(1, 2))
    return jnp.maximum(value, 0) + terms * size


def is_affine(risk: EmpiricalRisk, model: Model) -> bool:
    """Whether the outputs are affine in the parameters, read off the program, not the layers' names.

    An affine map is one that JAX can transpose (the transpose is traced, never run) and that casts
    nothing that depends on the parameters to fewer digits.
    """
    theta, rebuild = ravel(model)
    x = take(risk.data[0], 0)
    output = lambda t: risk.output(rebuild(t), x)
    shape = jax.eval_shape(output, theta)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        return False
    try:
        jax.eval_shape(lambda ct: jax.linear_transpose(output, theta)(ct), shape)
    except (
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
        KeyError,
    ):  # each primitive that cannot be transposed says so in its own way
        return False
    program = jax.make_jaxpr(output)(theta).jaxpr
    return not _casts(program, {*program.invars})


_ROUNDING = ("convert_element_type", "reduce_precision")


def _casts(program, dependent: set) -> bool:
    """Whether something in `dependent`, or computed from it, is cast to fewer digits."""
    for equation in program.eqns:
        inputs = [v for v in equation.invars if not hasattr(v, "val") and v in dependent]
        if not inputs:
            continue
        dependent.update(equation.outvars)
        if equation.primitive.name in _ROUNDING:
            old, new = inputs[0].aval.dtype, equation.outvars[0].aval.dtype
            exact = jnp.issubdtype(new, jnp.floating) and jnp.finfo(new).bits >= jnp.finfo(old).bits
            if equation.primitive.name == "reduce_precision" or not exact:
                return True
        for part in jtu.tree_leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns") and _casts(inner, {*inner.invars}):
                return True
    return False


def output_jacobian(risk: EmpiricalRisk, model: Model, inputs=None) -> AbstractJacobian:
    """The Jacobians of the outputs at `inputs` (the training inputs by default), as a head's where
    they have exactly its structure on every one of them."""
    require_array_output(risk, model)
    inputs = risk.data[0] if inputs is None else inputs
    general = OutputJacobian(risk, model, inputs)
    layout = _head_layout(risk, model)
    if layout is None or not general.affine or not is_concrete((risk, model, inputs)):
        return general
    is_head, features = _head_features(general, *layout)
    if not is_concrete(is_head) or not bool(is_head):  # inside a trace nothing can be compared
        return general
    return HeadJacobian(features, *layout)


def require_array_output(risk: EmpiricalRisk, model: Model) -> None:
    output = eqx.filter_eval_shape(risk.output, model, take(risk.data[0], 0))
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise ValueError(
            f"A Gauss–Newton or Fisher matrix needs outputs that are one array, got {output}. Join "
            "them in `predict`, e.g. by `jnp.concatenate`, and take them apart in the loss; or use "
            "Hessian()."
        )


def _head_layout(risk: EmpiricalRisk, model: Model) -> tuple[int, tuple[int, ...]] | None:
    """K and the widths, where every leaf has the K outputs as its first axis."""
    output = eqx.filter_eval_shape(risk.output, model, take(risk.data[0], 0))
    if not isinstance(output, jax.ShapeDtypeStruct) or len(output.shape) > 1:
        return None
    K = int(np.prod(output.shape))
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    if any(leaf.ndim == 0 or leaf.shape[0] != K for leaf in leaves):
        return None
    return K, tuple(leaf.size // K for leaf in leaves)


def _head_order(K: int, widths: tuple[int, ...]) -> Int[np.ndarray, "K d"]:
    starts = K * np.cumsum((0, *widths[:-1]))
    blocks = [s + np.arange(K * w).reshape(K, w) for s, w in zip(starts, widths)]
    return np.concatenate(blocks, axis=1)


@eqx.filter_jit
def _head_features(general: OutputJacobian, K: int, widths: tuple[int, ...]):
    """Row k of A is the features at output k's parameters and 0 elsewhere, the same for every k."""
    order = _head_order(K, widths)

    def one(x):
        blocks = general.rows(x)[:, order]  # [K, K, d]
        features = blocks[0, 0]
        expected = jnp.eye(K, dtype=features.dtype)[:, :, None] * features[None, None, :]
        return jnp.all(blocks == expected), features

    n = leading_length(general.inputs)
    chunk = min(n, chunk_length(3 * K * order.size, jnp.float64))
    is_head, features = chunked_map(one, general.inputs, chunk)
    return jnp.all(is_head), features


def head_features(risk: EmpiricalRisk, model: Model, inputs: PyTree[Array]) -> Float[Array, "n d"]:
    """h̃ of a linear head at `inputs`, as `HeadJacobian` holds them, of what is known to be one: the
    gradient of the first output, which is one forward pass and a copy."""
    layout = _head_layout(risk, model)
    assert layout is not None  # `output_jacobian` has found the head
    theta, rebuild = ravel(model)
    first = lambda t, x: risk.output(rebuild(t), x).reshape(-1)[0]
    rows = jax.vmap(lambda x: jax.grad(first)(theta, x))(inputs)
    return rows[:, _head_order(*layout)[0]]
