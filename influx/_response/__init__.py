from .base import AbstractResponse as AbstractResponse
from .implicit import Implicit as Implicit
