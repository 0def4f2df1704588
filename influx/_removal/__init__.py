from .mislabelled import REASONS as REASONS
from .mislabelled import Mislabelled as Mislabelled
from .mislabelled import find_mislabelled as find_mislabelled
