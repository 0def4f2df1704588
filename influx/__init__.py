"""Influence functions, memorization and certified removal for JAX and Equinox models."""

from ._loss import BinaryCrossEntropy as BinaryCrossEntropy
from ._loss import CustomLoss as CustomLoss
from ._loss import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from ._loss import SquaredError as SquaredError
from ._restriction import restrict as restrict
from ._risk import EmpiricalRisk as EmpiricalRisk
