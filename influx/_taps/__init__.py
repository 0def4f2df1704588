from .layers import Layer as Layer
from .layers import Rows as Rows
from .layers import Uncovered as Uncovered
from .rewrite import Rules as Rules
from .rewrite import check_rules as check_rules
from .rewrite import checked_rules as checked_rules
from .rewrite import ruled as ruled
from .watch import Watched as Watched
