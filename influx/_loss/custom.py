"""Any function of (output, target)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from .base import AbstractLoss, eigen_root


class CustomLoss(AbstractLoss):
    """Any scalar function of (output, target), as a loss.

    **Arguments:**

    - `fn`: `fn(output, target) -> scalar`, differentiable in `output`.
    - `sample`: `sample(key, output) -> target`, where `fn` is a negative log-likelihood and a
      sampled Fisher is wanted.
    - `logits`: `logits(output) -> [C]`, where the model is a classifier and margins are wanted.

    - `convex`: that `fn` is convex in its output is for you to say. The Gauss–Newton matrix is then
      positive semi-definite, which `restriction_bound` needs to know.

    The output Hessian is `jax.hessian(fn)`.
    """

    fn: Callable[[Any, Any], Array]
    sample: Callable | None = None
    logits: Callable | None = None
    convex: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        wanted = {"fn": "(output, target)", "sample": "(key, output)", "logits": "(output)"}
        for name, arguments in wanted.items():
            given = getattr(self, name)
            if not callable(given) and (given is not None or name == "fn"):
                raise ValueError(
                    f"`{name}` of a CustomLoss must be a function of {arguments}, got {given!r}."
                )

    def __call__(self, output, target):
        return self.fn(output, target)

    def output_hessian(self, output, target):
        at = lambda flat: self.fn(flat.reshape(output.shape), target)
        return jax.hessian(at)(output.reshape(-1))

    def hessian_root(self, output, target):
        return eigen_root(self.output_hessian(output, target)).reshape(-1, *output.shape)

    def output_fisher(self, output):
        raise ValueError(
            'CustomLoss has no exact Fisher. Use Fisher("sampled") with `sample=`, '
            'Fisher("empirical"), or the Gauss–Newton matrix: GaussNewton(), EKFAC("ggn").'
        )

    def fisher_root(self, output):
        return self.output_fisher(output)  # says why there is none

    def draw(self, key, output):
        if self.sample is None:
            raise ValueError(
                "A sampled Fisher needs labels drawn from the model. Write "
                "`CustomLoss(fn, sample=lambda key, output: ...)`, or use GaussNewton()."
            )
        return self.sample(key, output)

    def residuals(self, output):
        return 0

    def class_logits(self, output):
        if self.logits is None:
            raise ValueError(
                "Class probabilities, logits and margins of a CustomLoss need "
                "`CustomLoss(fn, logits=lambda output: ...)`; or use `influx.measure(f, fn)`."
            )
        return self.logits(output)

    def constants(self, output):
        raise ValueError(
            "CustomLoss has no known bounds, so nothing about it can be certified. "
            "Use SoftmaxCrossEntropy or BinaryCrossEntropy."
        )

    def check(self, output, targets):
        pass
