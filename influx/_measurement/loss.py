from .base import AbstractOutputMeasurement, MeasurementConstants


class Loss(AbstractOutputMeasurement):
    """m = ℓ(query, θ), the training loss of the query. Influence < 0: helpful, > 0: harmful."""

    def of_output(self, loss, output, target):
        return loss(output, target)

    def bounds(self, loss, output):
        of_loss = loss.constants(output)
        return MeasurementConstants(of_loss.lipschitz, of_loss.smoothness)
