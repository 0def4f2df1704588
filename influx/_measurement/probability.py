import jax.nn as jnn
import numpy as np
from jaxtyping import Int

from .._custom_types import Scalar
from .base import AbstractOutputMeasurement, MeasurementConstants, select_class, softmax_logits


class Probability(AbstractOutputMeasurement):
    """m = p_c(x) for every class c, [C], or for one.

    ‖∇p_c‖ = p_c ‖e_c − p‖ ≤ √2 p_c(1 − p_c) ≤ √2/4. ∇²p_c = p_c [(e_c − p)(e_c − p)ᵀ − (diag p − ppᵀ)]
    is a difference of two positive semi-definite matrices of norms at most 2p_c(1 − p_c)² ≤ 8/27 and
    p_c/2, so its norm is at most ½.
    """

    class_: Int[Scalar, ""] | None = None

    def of_output(self, loss, output, target):
        return select_class(jnn.softmax(softmax_logits(loss, output)), self.class_)

    def bounds(self, loss, output):
        loss.constants(output)  # refuses losses whose logits are any function of the output
        return MeasurementConstants(np.sqrt(2.0) / 4, 0.5)
