from jaxtyping import Int

from .._custom_types import Scalar
from .base import AbstractOutputMeasurement, MeasurementConstants, select_class, softmax_logits


class Logit(AbstractOutputMeasurement):
    """m = z_c(x) for every class c, [C], or for one."""

    class_: Int[Scalar, ""] | None = None

    def of_output(self, loss, output, target):
        return select_class(softmax_logits(loss, output), self.class_)

    def bounds(self, loss, output):
        loss.constants(output)  # refuses losses whose logits are any function of the output
        return MeasurementConstants(1.0, 0.0)
