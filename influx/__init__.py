"""Influence functions, memorization and certified removal for JAX and Equinox models."""

from ._curvature import CG as CG
from ._curvature import MINRES as MINRES
from ._curvature import BlockDiagonal as BlockDiagonal
from ._curvature import Diagonal as Diagonal
from ._curvature import Fisher as Fisher
from ._curvature import GaussNewton as GaussNewton
from ._curvature import Hessian as Hessian
from ._curvature import Identity as Identity
from ._influence import Influence as Influence
from ._influence import influence as influence
from ._loss import BinaryCrossEntropy as BinaryCrossEntropy
from ._loss import CustomLoss as CustomLoss
from ._loss import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from ._loss import SquaredError as SquaredError
from ._restriction import restrict as restrict
from ._risk import EmpiricalRisk as EmpiricalRisk
from ._scale import Reference as Reference
from ._transform import classification as classification
from ._transform import groups as groups
from ._transform import measure as measure
from ._transform import relative as relative
from ._transform import removal as removal
from ._transform import self_influence as self_influence
