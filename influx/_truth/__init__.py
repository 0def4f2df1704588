from .lds import LDS as LDS
from .lds import lds as lds
from .leave_one_out import leave_one_out as leave_one_out
from .leave_subset_out import leave_subset_out as leave_subset_out
from .pbrf import pbrf as pbrf
from .subsampled_memorization import SubsampledMemorization as SubsampledMemorization
from .subsampled_memorization import subsampled_memorization as subsampled_memorization
