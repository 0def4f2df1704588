from .base import AbstractScoring as AbstractScoring
from .gradients import ForwardMode as ForwardMode
from .gradients import PerExample as PerExample
from .layered import Layered as Layered
