from .layers import Layer as Layer
from .layers import Rows as Rows
from .layers import Uncovered as Uncovered
from .watch import Watched as Watched
