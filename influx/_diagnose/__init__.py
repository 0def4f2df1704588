from .base import Diagnosis as Diagnosis
from .diagnose import diagnose as diagnose
