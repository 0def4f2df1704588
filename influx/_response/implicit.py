import equinox as eqx
import jax

from .._chunks import Limits
from .._curvature import AbstractCurvature, AbstractFactored
from .._curvature.newton_step import AbstractNewtonSteps
from .._custom_types import Model
from .._engine import AbstractScoring, Layered, PerExample, choose
from .._gradients import risk_gradient
from .._jacobian import AbstractJacobian, output_jacobian
from .._linalg import ravel, two_derivatives
from .._risk import EmpiricalRisk
from .base import AbstractResponse


class Implicit(AbstractResponse):
    """R = −(1/n) H⁻¹ [g_1 … g_n], by the implicit function theorem at θ̂.

    Holds the curvature factored once. Gradients of training points are recomputed a chunk at a time,
    in the way that `scoring` says.
    """

    risk: EmpiricalRisk
    model: Model
    curvature: AbstractCurvature
    factored: AbstractFactored
    output: jax.ShapeDtypeStruct | None = eqx.field(static=True)  # of one input, if one array
    jacobian: AbstractJacobian | None
    newton: AbstractNewtonSteps | None
    scoring: AbstractScoring

    def __init__(
        self,
        risk: EmpiricalRisk,
        model: Model,
        curvature: AbstractCurvature,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
    ):
        self.risk, self.model, self.curvature = risk, model, curvature
        self.factored = curvature.factor(risk, model)
        layered = self.factored.layered is not None
        self.scoring = (Layered if layered else PerExample)(limits)
        output = risk.output_struct(model)
        self.output = output if isinstance(output, jax.ShapeDtypeStruct) else None
        self.jacobian = output_jacobian(risk, model) if self.output is not None else None
        self.newton = curvature.newton_steps(risk, model, self.factored, self.jacobian)

    @property
    def limits(self):
        return self.scoring.limits

    def scheduled(self, measurement, query, queries, kept, limits):
        ways = self.scoring.alternatives(self, measurement, query)
        m = jax.eval_shape(lambda q: measurement(self.risk, self.model, q), query)
        schedule = choose(ways, limits, queries, self.risk.n, max(1, m.size) * kept, m.dtype)
        return eqx.tree_at(lambda r: r.scoring, self, schedule.scorer), schedule

    def prepare(self, measurement, query):
        return self.scoring.prepare(self, measurement, query)

    def columns(self, prepared, indices):
        return self.scoring.columns(self, prepared, indices)

    def quadratic(self, prepared):
        return self.scoring.quadratic(self, prepared)

    def own(self, measurement, *, power=1):
        # Nothing here takes a tolerance: another one is no other program.
        exact = eqx.tree_at(lambda r: r.factored, self, self.factored.exact)
        return _own(exact, measurement, power)

    def solve(self, vectors):
        return jax.vmap(self.factored.solve)(vectors)

    def check_displace(self):
        if self.newton is None:
            raise ValueError(
                f"{type(self.curvature).__name__} does not say what one point adds to the "
                f"curvature, or {type(self.factored).__name__}, by which it solves, is no "
                "AbstractPerturbable: a Newton step without that point is undefined. Use Hessian() or "
                'GaussNewton(), or the first order: `removal(f, "first-order")`, `memorization(f, '
                '"first-order")`, `value(f, heldout)`.'
            )

    def displace(self, indices):
        return _displace(self, indices)

    def check_path(self):
        pass

    def path(self, lost):
        r"""By differentiating the slope F(ε) = ∇J(θ(ε); w − ε·lost), which stays what it is, twice:

            H θ′ = ∇K,    H θ″ = 2∇²K θ′ − ∇³J[θ′, θ′],    K = (1/n) Σ lostᵢ ℓᵢ.

        The right side of the second is −F″(0) along the straight line θ̂ + εθ′. With λ > 0 the minimiser
        is that of J + ½λ‖θ − θ̂‖².
        """
        theta, rebuild = ravel(self.model)
        lost_risk = lambda t: self.risk.mean(self.risk.losses(rebuild(t)), lost)
        first = self.factored.solve(jax.grad(lost_risk)(theta))
        slope = lambda e: risk_gradient(
            self.risk, rebuild(theta + e * first), self.risk.weights - e * lost
        )
        _, bend = two_derivatives(slope, theta.dtype)
        return first, -self.factored.solve(bend)

    def settle(self):
        return -self.factored.solve(risk_gradient(self.risk, self.model))


def implicit_response(response: AbstractResponse, verb: str) -> Implicit:
    """`response`, where it has a curvature."""
    if not isinstance(response, Implicit):
        raise ValueError(
            f"`{verb}` needs a curvature, and this influence has none: use "
            "`influence(risk, f.model, Hessian())`."
        )
    return response


@eqx.filter_jit
def _displace(response: Implicit, indices):
    assert response.newton is not None  # `check_displace` has seen to it
    parts = response.risk, response.model, response.factored, response.jacobian
    return response.newton.steps(*parts, indices)


@eqx.filter_jit
def _own(response: Implicit, measurement, power: int):
    return response.scoring.own(response, measurement, power)
