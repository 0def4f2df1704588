"""The abstract classes of influx, and what their methods take and answer, for those who add a member.

`docs/extending.md` shows one new member of each family.
"""

from ._curvature import AbstractCurvature as AbstractCurvature
from ._curvature import AbstractFactored as AbstractFactored
from ._curvature import AbstractMatrixCurvature as AbstractMatrixCurvature
from ._curvature import AbstractPerturbable as AbstractPerturbable
from ._curvature import AbstractWrapped as AbstractWrapped
from ._curvature import Factored as Factored
from ._linalg import ravel as ravel
from ._loss import AbstractLoss as AbstractLoss
from ._loss import LossConstants as LossConstants
from ._loss import eigen_root as eigen_root
from ._measurement import AbstractMeasurement as AbstractMeasurement
from ._measurement import AbstractOutputMeasurement as AbstractOutputMeasurement
from ._measurement import MeasurementConstants as MeasurementConstants
from ._train import AbstractTrainer as AbstractTrainer
from ._train import Trained as Trained
