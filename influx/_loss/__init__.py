from .base import AbstractLoss as AbstractLoss
from .base import LossConstants as LossConstants
from .base import eigen_root as eigen_root
from .binary import BinaryCrossEntropy as BinaryCrossEntropy
from .custom import CustomLoss as CustomLoss
from .softmax import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from .squared import SquaredError as SquaredError
