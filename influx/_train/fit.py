import equinox as eqx

from .._checks import require_concrete
from .._custom_types import Model
from .._risk import EmpiricalRisk
from .._validate import validate
from .base import AbstractTrainer, Trained, check_trainer


def fit(risk: EmpiricalRisk, model: Model, trainer: AbstractTrainer) -> Model:
    """The model that `trainer` makes of `model` on `risk`, at the risk's own data weights.

    ```python
    model = influx.fit(risk, model, influx.Newton())
    ```

    **Arguments:** `trainer`: `Newton()` for convex problems of up to a few thousand parameters,
    `LBFGS()` beyond, `SGD(...)` for networks.

    **Raises:** `ValueError` where risk, model and trainer do not fit together; `RuntimeError` where
    the trainer did not converge, with the gradient norm it reached and what to change.
    """
    check_trainer(trainer)
    require_concrete("fit", risk, model)
    risk = validate(risk, model)
    return fitted(risk, model, trainer)[0]


def fitted(risk: EmpiricalRisk, model: Model, trainer: AbstractTrainer) -> tuple[Model, Trained]:
    """As `fit`, of what has been checked already, with how the training ended."""
    trained_model, trained = _fit(risk, model, trainer)
    if not bool(trained.converged):
        raise RuntimeError(
            f"Training did not converge: ‖∇J‖ = {float(trained.gradient_norm):.3g} after "
            f"{int(trained.steps)} steps. {trainer.remedies()}"
        )
    return trained_model, trained


@eqx.filter_jit
def _fit(risk: EmpiricalRisk, model: Model, trainer: AbstractTrainer) -> tuple[Model, Trained]:
    state = trainer.init(risk, model, risk.weights)
    return trainer.train(state, risk, model, risk.weights)
