from .affine import is_affine as is_affine
from .base import AbstractJacobian as AbstractJacobian
from .head import HeadJacobian as HeadJacobian
from .output_jacobian import head_features as head_features
from .output_jacobian import output_jacobian as output_jacobian
from .output_jacobian import require_array_output as require_array_output
from .reverse import OutputJacobian as OutputJacobian
