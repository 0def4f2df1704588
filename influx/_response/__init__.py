from .base import AbstractResponse as AbstractResponse
from .implicit import Implicit as Implicit
from .implicit import implicit_response as implicit_response
from .unrolled import TrainingRun as TrainingRun
from .unrolled import Unrolled as Unrolled
from .without import Without as Without
