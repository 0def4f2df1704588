from .prune import Pruned as Pruned
from .prune import PruneHistory as PruneHistory
from .prune import prune as prune
from .removed import Removed as Removed
from .train_with_removal import RemovalHistory as RemovalHistory
from .train_with_removal import TrainedWithRemoval as TrainedWithRemoval
from .train_with_removal import train_with_removal as train_with_removal
