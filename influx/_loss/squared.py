"""Squared error."""

import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .base import AbstractLoss, LossConstants
from .checks import array_target, check_output, check_shape


class SquaredError(AbstractLoss):
    """ℓ = ½ ‖output − target‖², summed over all outputs.

    The factor ½ makes it the negative log-likelihood of unit-variance Gaussian noise: output
    Hessian and Fisher are the identity.
    """

    @property
    def convex(self):
        return True

    def __call__(self, output, target):
        return 0.5 * jnp.sum(jnp.square(output - target))

    def output_hessian(self, output, target):
        return jnp.eye(output.size, dtype=output.dtype)

    def hessian_root(self, output, target):
        return self.fisher_root(output)

    def output_fisher(self, output):
        return jnp.eye(output.size, dtype=output.dtype)

    def fisher_root(self, output):
        return jnp.eye(output.size, dtype=output.dtype).reshape(-1, *output.shape)

    def draw(self, key, output):
        return output + jr.normal(key, output.shape, output.dtype)

    def residuals(self, output):
        return math.prod(output.shape)

    def class_logits(self, output):
        raise ValueError(
            "SquaredError is no classifier: it has no classes, margins or memorization labels. "
            "Use `influx.measure(f, fn)`, or train with SoftmaxCrossEntropy or BinaryCrossEntropy."
        )

    def constants(self, output):
        return LossConstants(lipschitz=np.inf, smoothness=1.0, third=0.0, hard=False)

    def check(self, output, targets):
        check_output(output, "SquaredError")
        check_shape(
            array_target(targets),
            output.shape,
            "SquaredError takes targets of the output's shape",
            "Add or drop the axis: `y[:, None]`, `y[:, 0]`.",
        )
