"""Cross-entropy of independent yes/no labels."""

import jax.nn as jnn
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._checks import is_concrete
from .base import AbstractLoss, LossConstants
from .checks import array_target, check_output, check_shape, few, flat_rows


class BinaryCrossEntropy(AbstractLoss):
    """ℓ = Σ_k log(1 + exp(z_k)) − y_k z_k, with targets y in {0, 1} of the output's shape.

    A scalar output (shape () or (1,)) is a classifier of two classes with logits (0, z); several
    outputs are independent yes/no labels, and their losses are summed.
    """

    @property
    def convex(self):
        return True

    def __call__(self, output, target):
        # softplus(z) − z would lose the digits of a large z; what is no label is NaN, under a trace too.
        target = jnp.asarray(target, output.dtype)
        signed = jnp.where(target == 1, -output, jnp.where(target == 0, output, jnp.nan))
        return jnp.sum(jnn.softplus(signed))

    def output_hessian(self, output, target):
        z = output.reshape(-1)
        return jnp.diag(
            jnn.sigmoid(z) * jnn.sigmoid(-z)
        )  # 1 − σ(z) would lose the digits of a large z

    def hessian_root(self, output, target):
        return self.fisher_root(output)

    def output_fisher(self, output):
        return self.output_hessian(output, None)

    def fisher_root(self, output):
        z = output.reshape(-1)
        deviation = jnp.sqrt(jnn.sigmoid(z) * jnn.sigmoid(-z))
        return jnp.diag(deviation).reshape(-1, *output.shape)

    def draw(self, key, output):
        return jr.bernoulli(key, jnn.sigmoid(output)).astype(jnp.int32)

    def residuals(self, output):
        return 0

    def class_logits(self, output):
        if output.size != 1:
            raise ValueError(
                "Class probabilities, logits and margins need one binary output per example, got "
                f"outputs of shape {output.shape}. Use `influx.measure(f, fn)`."
            )
        z = output.reshape(())
        return jnp.stack([jnp.zeros_like(z), z])

    def constants(self, output):
        # |σ − y| ≤ 1, σ' ≤ ¼ and |σ''| ≤ 1/(6√3), each per output.
        return LossConstants(
            lipschitz=np.sqrt(float(np.prod(output.shape))),
            smoothness=0.25,
            third=1 / (6 * np.sqrt(3.0)),
            hard=True,
        )

    def check(self, output, targets):
        check_output(output, "BinaryCrossEntropy")
        targets = array_target(targets)
        check_shape(
            targets,
            output.shape,
            "BinaryCrossEntropy takes labels of the output's shape",
            "Add or drop the axis: `y[:, None]`, `y[:, 0]`; for a logit of each class, one of which is "
            "right, use SoftmaxCrossEntropy.",
        )
        if is_concrete(targets) and not np.isin(np.asarray(targets), (0, 1)).all():
            bad = np.flatnonzero(np.any(flat_rows(~np.isin(np.asarray(targets), (0, 1))), axis=1))
            raise ValueError(
                f"BinaryCrossEntropy takes labels 0 and 1, got others at examples {few(bad)}. "
                "Labels -1 and 1 become such by `(y > 0).astype(int)`; for probabilities use "
                "`CustomLoss`."
            )
