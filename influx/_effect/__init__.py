from .base import AbstractEffect as AbstractEffect
from .derivative import Derivative as Derivative
from .removal import FirstOrder as FirstOrder
from .removal import Newton as Newton
from .second_order import SecondOrder as SecondOrder
from .second_order import change_along as change_along
