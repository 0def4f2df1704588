import abc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_held, is_concrete
from .._custom_types import Model, Scalar, ScalarLike
from .._jacobian import AbstractJacobian
from .._linalg import products, ravel
from .._risk import EmpiricalRisk

if TYPE_CHECKING:
    from .kronecker import Kronecker
    from .newton_step import AbstractNewtonSteps


class AbstractFactored(eqx.Module):
    """A damped curvature H + λI made ready once, to be solved with many times.

    The law: `factored.solve(factored.matvec(v)) == v`.
    """

    @property
    @abc.abstractmethod
    def matrix(self) -> Float[Array, "P P"] | None:
        """H + λI, where it is held as a matrix."""

    @property
    @abc.abstractmethod
    def matvec(self) -> Callable[[Float[Array, " P"]], Float[Array, " P"]]:
        """The map v ↦ (H + λI) v. What all its products share is computed when it is asked for."""

    @property
    def layered(self) -> "Kronecker | None":
        """The same curvature as one Kronecker-factored block a layer, where it is such."""
        return None

    @property
    def exact(self) -> "AbstractFactored":
        """The same without what only a tolerance of its scores needs."""
        return self

    @property
    def dampings(self) -> Float[Array, " P"] | None:
        """λ of every parameter, where it is not one number that the curvature was given."""
        return None

    @property
    def inverts(self) -> bool:
        """Whether `solve` is an inverse, and not 0 outside a subspace."""
        return True

    @property
    def solve_flops(self) -> float | None:
        """Additions and multiplications of one solve; `None` where it takes as many products with the
        curvature as it needs."""
        return None

    @abc.abstractmethod
    def try_solve(self, v: Float[Array, " P"]) -> tuple[Float[Array, " P"], Array]:
        """(H + λI)⁻¹ v, and whether the solve met its tolerance."""

    def counted_solve(
        self, v: Float[Array, " P"]
    ) -> tuple[Float[Array, " P"], Array, Array | None]:
        """`try_solve`, and the steps that it took; `None` where a solve has none."""
        return *self.try_solve(v), None

    def solve(self, v: Float[Array, " P"]) -> Float[Array, " P"]:
        """(H + λI)⁻¹ v; an error where the solve did not converge."""
        x, converged = self.try_solve(v)
        x = eqx.error_if(
            x,
            jnp.any(jnp.isnan(v)),
            "The gradient of the measurement, or of a training point's loss, is NaN. Check both at this "
            "model for log(0), 0/0 or sqrt(0).",
        )
        return eqx.error_if(
            x,
            ~converged,
            "A linear solve with the curvature did not converge. Use more `damping=`, float64 "
            "(float32 keeps 7 digits, which an ill-conditioned curvature uses up), more steps "
            "(`max_steps=`), a looser `rtol=`, a `preconditioner=`, or a direct solve (without CG).",
        )


class AbstractPerturbable(AbstractFactored):
    """One to which any symmetric matrix can be added, and which can still be solved with.

    A Newton step without a point needs it where the point's share of the Hessian has no low rank. The
    law: `factored.perturbed(p).matvec(v) == factored.matvec(v) + p(v)`, and that of all solves again.
    """

    @abc.abstractmethod
    def perturbed(self, matvec: Callable[[Array], Array]) -> "AbstractPerturbable":
        """The same curvature with a matrix B added, `matvec` being v ↦ Bv on vectors [P]. Whether it can
        be solved with is said by `try_solve`."""


class Factored(AbstractPerturbable):
    """A lineax operator, a lineax solver, and what that solver prepared."""

    operator: lx.AbstractLinearOperator
    solver: lx.AbstractLinearSolver
    state: Any

    def __init__(self, operator: lx.AbstractLinearOperator, solver: lx.AbstractLinearSolver):
        self.operator = operator
        self.solver = solver
        self.state = solver.init(operator, {})

    @property
    def matrix(self):
        is_matrix = isinstance(self.operator, lx.MatrixLinearOperator)
        return self.operator.as_matrix() if is_matrix else None

    @property
    def matvec(self):
        return self.operator.mv

    @property
    def solve_flops(self):
        P = self.operator.in_size()
        if isinstance(self.operator, lx.DiagonalLinearOperator):
            return 1.0 * P
        return None if self.matrix is None else 2.0 * P**2

    def try_solve(self, v):
        with jax.default_matmul_precision("highest"):
            solution = lx.linear_solve(self.operator, v, self.solver, state=self.state, throw=False)
        return solution.value, solution.result == lx.RESULTS.successful

    def perturbed(self, matvec):
        definite = lx.is_positive_semidefinite(self.operator)
        tags = (lx.symmetric_tag, lx.positive_semidefinite_tag) if definite else lx.symmetric_tag
        added = lx.FunctionLinearOperator(matvec, self.operator.in_structure(), lx.symmetric_tag)
        sparse = isinstance(self.solver, (lx.Diagonal, lx.Tridiagonal, lx.Triangular))
        solver = lx.AutoLinearSolver(well_posed=True) if sparse else self.solver
        return Factored(lx.TaggedLinearOperator(self.operator + added, tags), solver)


class Damped(eqx.Module):
    """H + λI of a curvature by its products, and a matrix `added` on top, if any."""

    risk: EmpiricalRisk
    model: Model
    curvature: "AbstractCurvature"
    added: Callable[[Array], Array] | None = None

    @property
    def matvec(self) -> Callable[[Array], Array]:
        product, added = self.curvature.matvec(self.risk, self.model), self.added
        damped = lambda v: product(v) + jnp.asarray(self.curvature.damping, v.dtype) * v
        return damped if added is None else lambda v: damped(v) + added(v)

    def plus(self, matvec: Callable[[Array], Array]) -> "Damped":
        before = self.added
        return replace(self, added=matvec if before is None else lambda v: before(v) + matvec(v))


def symmetric(matrix: Float[Array, "P P"]) -> lx.MatrixLinearOperator:
    """A dense symmetric operator; rounding's asymmetry is averaged away."""
    return lx.MatrixLinearOperator(
        0.5 * (matrix + matrix.T), (lx.symmetric_tag, lx.positive_semidefinite_tag)
    )


class AbstractCurvature(eqx.Module):
    """What stands for H = ∇²J in I(i; m) = −∇mᵀ(H + λI)⁻¹gᵢ. It contains ∇²Ω = diag(l2).

    A curvature holds its settings only; `factor` meets it with a risk and a model. `damping` is λ,
    always added to a curvature that already contains l2; `None` where `factor` finds it.
    """

    damping: eqx.AbstractVar[Scalar]

    def __repr__(self) -> str:
        return eqx.tree_pformat(self, short_arrays=False)  # settings are for reading

    @abc.abstractmethod
    def matvec(self, risk: EmpiricalRisk, model: Model) -> Callable[[Array], Array]:
        """The map v ↦ Hv, undamped, in the order of `ravel(model)`."""

    @abc.abstractmethod
    def lower_end(self, risk: EmpiricalRisk, model: Model) -> float | None:
        """A number known to lie below every eigenvalue of H + λI, such as min l2 + λ where the rest is
        positive semi-definite by construction; `None` where none is known."""

    @abc.abstractmethod
    def factor(self, risk: EmpiricalRisk, model: Model) -> AbstractFactored:
        """H + λI, ready for `solve`.

        **Raises:** `ValueError` where it is indefinite or singular, naming the eigenvalue.
        """

    @abc.abstractmethod
    def newton_steps(
        self,
        risk: EmpiricalRisk,
        model: Model,
        factored: AbstractFactored,
        jacobian: AbstractJacobian | None,
    ) -> "AbstractNewtonSteps | None":
        """The Newton steps without single points (P10), made ready for `factored`; `None` where one
        point's share of the curvature is not known, or `factored` cannot be solved with without it.
        `jacobian` is that of all training outputs, `None` where they are not one array."""


def check_curvature(curvature) -> AbstractCurvature:
    if not isinstance(curvature, AbstractCurvature):
        raise ValueError(
            f"`curvature` must be a curvature such as influx.Hessian(), got {curvature!r}. "
            "Mind the parentheses: Hessian(), not Hessian."
        )
    return curvature


def check_wrapped(curvature) -> AbstractCurvature:
    """A curvature that is solved with by its products: its λ has to be a number beforehand."""
    if check_curvature(curvature).damping is None:
        raise ValueError(
            f"{type(curvature).__name__} has no damping before it meets the data, and what is around "
            'it needs one number λ: give `damping=` as a number instead of "auto". A Mixture has a λ '
            "for each part: put what solves inside it, `Mixture({where: CG(...)}, CG(...))`."
        )
    return curvature


class AbstractWrapped(AbstractCurvature):
    """`curvature`, solved with in the way that `factor` chooses: all else is that curvature's own."""

    curvature: AbstractCurvature = eqx.field(converter=check_wrapped)

    @property
    def damping(self):
        return self.curvature.damping

    def matvec(self, risk, model):
        return self.curvature.matvec(risk, model)

    def lower_end(self, risk, model):
        return self.curvature.lower_end(risk, model)

    def newton_steps(self, risk, model, factored, jacobian):
        return self.curvature.newton_steps(risk, model, factored, jacobian)


class AbstractMatrixCurvature(AbstractCurvature):
    """A curvature that is a dense [P, P] matrix: O(P²) memory, one Cholesky factor of O(P³)."""

    @abc.abstractmethod
    def matrix(self, risk: EmpiricalRisk, model: Model) -> Float[Array, "P P"]:
        """H, undamped."""

    def factor(self, risk, model):
        _check_matrix(model)
        return factor_matrix(self.matrix(risk, model), self.damping)


def _check_matrix(model: Model) -> None:
    theta, _ = ravel(model)
    check_held(
        theta.size**2 * theta.dtype.itemsize,
        f"A dense curvature of {theta.size:,} parameters",
        "Use CG(GaussNewton()), which never forms it, or keep fewer parameters: "
        "`influx.restrict(risk, model, lambda m: m.layers[-1])`.",
    )


def factor_matrix(matrix: Float[Array, "P P"], damping: ScalarLike) -> Factored:
    """Cholesky factor of H + λI, with its definiteness checked."""
    matrix = matrix + jnp.asarray(damping, matrix.dtype) * jnp.eye(
        matrix.shape[0], dtype=matrix.dtype
    )
    factored = Factored(symmetric(matrix), lx.Cholesky())
    if is_concrete(matrix):
        _check_definite(factored.operator.as_matrix(), factored)
    return factored


def _check_definite(matrix: Float[Array, "P P"], factored: Factored) -> None:
    eps = float(jnp.finfo(matrix.dtype).eps)
    pivots = np.abs(np.diagonal(np.asarray(jtu.tree_leaves(factored.state)[0])))
    safe = np.isfinite(pivots).all() and pivots.min() ** 2 > 1e3 * eps * pivots.max() ** 2
    if safe:
        return
    if not bool(jnp.all(jnp.isfinite(matrix))):
        raise ValueError(
            "The curvature has NaN or infinite entries: an output, or a derivative of the loss, is "
            "NaN or overflows at this model. Check `predict` and the loss for log(0), 0/0 or sqrt(0)."
        )
    eigenvalues = np.linalg.eigvalsh(np.asarray(matrix))
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    floor = matrix.shape[0] * eps * max(high, -low)
    if low > floor:
        return
    kind = "indefinite" if low < -floor else "singular"
    remedy = max(1e-3 * high, -2 * low)
    others = {
        "singular": "or an l2 > 0 on every parameter.",
        "indefinite": "an l2 > 0 on every parameter, a positive semi-definite curvature such as "
        "GaussNewton() with a convex loss, or train to a minimum.",
    }
    raise ValueError(
        f"The curvature is {kind}: its smallest eigenvalue is {low:.3g}, its largest {high:.3g}. "
        f"Its inverse is no influence. Use a positive damping (say damping={remedy:.1g}), {others[kind]}"
    )


def least_penalty(risk: EmpiricalRisk, model: Model, damping: ScalarLike) -> float:
    """min l2 + λ, below every eigenvalue of a positive semi-definite matrix + diag(l2) + λI."""
    return float(jnp.min(risk.l2_vector(model))) + float(damping)


def hvp_matrix(matvec: Callable[[Array], Array], theta: Float[Array, " P"]) -> Float[Array, "P P"]:
    """A symmetric matrix from its products with the unit vectors, a chunk at a time."""
    return products(matvec, jnp.eye(theta.size, dtype=theta.dtype))
