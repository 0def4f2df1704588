from .classification import classification as classification
from .groups import groups as groups
from .measure import measure as measure
from .relative import relative as relative
from .relative import self_influence as self_influence
from .removal import removal as removal
