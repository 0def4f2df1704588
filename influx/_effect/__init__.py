from .base import AbstractEffect as AbstractEffect
from .derivative import Derivative as Derivative
from .removal import FirstOrder as FirstOrder
from .removal import Newton as Newton
