from .base import AbstractTrainer as AbstractTrainer
from .base import Trained as Trained
from .base import check_trainer as check_trainer
from .fit import fit as fit
from .lbfgs import LBFGS as LBFGS
from .newton import Newton as Newton
from .sgd import SGD as SGD
