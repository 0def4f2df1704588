from .certificate import Certificate as Certificate
from .certificate import certify as certify
