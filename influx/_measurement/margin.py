import jax.nn as jnn
import jax.numpy as jnp
import numpy as np

from .base import AbstractOutputMeasurement, MeasurementConstants, softmax_logits


class Margin(AbstractOutputMeasurement):
    """m = γ = z_y − logsumexp_{c≠y} z_c = log p_y − log(1 − p_y), the log-odds of the given label.

    Computed in the first form; the second overflows in float32. ∇γ = e_y − q with q a distribution on
    the other classes, so ‖∇γ‖ ≤ √2; −∇²γ = diag q − qqᵀ has norm at most ½ (γ is concave).
    """

    def of_output(self, loss, output, target):
        return margin(softmax_logits(loss, output), jnp.asarray(target).reshape(()).astype(int))

    def bounds(self, loss, output):
        loss.constants(output)  # refuses losses whose logits are any function of the output
        return MeasurementConstants(np.sqrt(2.0), 0.5)


def margin(logits, label):
    """γ of logits [C] at an integer label; NaN where it is no class, which a trace cannot refuse."""
    C = logits.shape[0]
    value = logits[label] - jnn.logsumexp(logits, where=jnp.arange(C) != label)
    return value * jnp.where((label >= 0) & (label < C), jnp.ones((), value.dtype), jnp.nan)
