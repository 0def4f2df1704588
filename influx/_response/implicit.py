import equinox as eqx
import jax
import jax.numpy as jnp

from .._curvature import AbstractCurvature, AbstractFactored
from .._curvature.newton_step import AbstractNewtonSteps
from .._custom_types import Model
from .._gradients import map_gradients, risk_gradient
from .._jacobian import AbstractJacobian, output_jacobian
from .._misc import dot, take
from .._risk import EmpiricalRisk
from .base import AbstractResponse


class Implicit(AbstractResponse):
    """R = −(1/n) H⁻¹ [g_1 … g_n], by the implicit function theorem at θ̂ (theory: §2).

    Holds the curvature factored once. Per-example gradients are recomputed a chunk at a time.
    """

    risk: EmpiricalRisk
    model: Model
    curvature: AbstractCurvature
    factored: AbstractFactored
    output: jax.ShapeDtypeStruct | None = eqx.field(static=True)  # of one input, if one array
    jacobian: AbstractJacobian | None
    newton: AbstractNewtonSteps | None
    chunk_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        risk: EmpiricalRisk,
        model: Model,
        curvature: AbstractCurvature,
        *,
        chunk_size: int | None = None,
    ):
        self.risk, self.model, self.curvature = risk, model, curvature
        self.factored = curvature.factor(risk, model)
        self.chunk_size = chunk_size
        output = eqx.filter_eval_shape(risk.output, model, take(risk.data[0], 0))
        self.output = output if isinstance(output, jax.ShapeDtypeStruct) else None
        self.jacobian = output_jacobian(risk, model) if self.output is not None else None
        self.newton = curvature.newton_steps(risk, model, self.factored, self.jacobian)

    def prepare(self, vectors):
        return jax.vmap(self.factored.solve)(vectors)

    def columns(self, prepared, indices):
        data = self.risk.data if indices is None else take(self.risk.data, indices)
        products = self._map_gradients(lambda _, g: dot(prepared, g), data)
        return -jnp.transpose(products)

    def quadratic(self, vectors):
        return jnp.sum(vectors * self.prepare(vectors), axis=1)

    def map_solved(self, fn):
        solved = lambda z, g: fn(z, g, self.factored.solve(g))
        return self._map_gradients(solved, self.risk.data)

    def check_displace(self):
        if self.newton is None:
            raise ValueError(
                f"{type(self.curvature).__name__} does not say what one point adds to the "
                "curvature, so a Newton step without that point is undefined. Use Hessian() or "
                'GaussNewton(), or `removal(f, "first-order")`.'
            )

    def newton_steps(self, indices):
        return _newton_steps(self, indices)

    def settle(self):
        return -self.factored.solve(risk_gradient(self.risk, self.model))

    def _map_gradients(self, fn, data):
        return map_gradients(fn, self.risk, self.model, data, chunk_size=self.chunk_size)


def implicit_response(response: AbstractResponse, verb: str) -> Implicit:
    """`response`, where it has a curvature."""
    if not isinstance(response, Implicit):
        raise ValueError(
            f"`{verb}` needs a curvature, and this influence has none: use "
            "`influence(risk, model, Hessian())`."
        )
    return response


@eqx.filter_jit
def _newton_steps(response: Implicit, indices):
    assert response.newton is not None  # `check_displace` has seen to it
    parts = response.risk, response.model, response.factored, response.jacobian
    return response.newton.steps(*parts, indices)
