from .base import AbstractScale as AbstractScale
from .base import Unscaled as Unscaled
from .cosine import Cosine as Cosine
from .reference import Reference as Reference
from .size import BySize as BySize
from .size import sizes as sizes
