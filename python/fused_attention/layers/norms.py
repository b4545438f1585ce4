"""RMSNorm, fused, and for activations of a lower precision than its weight too, which some models keep in float32.

    out = x / sqrt(mean(x²) + eps) · weight

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
"""

import torch
from torch import Tensor, nn

from fused_attention.layer_ops import add_norm

from .acceptance import autocasts


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension; where x and weight differ in dtype, of which torch warns, computed in the wider one.

    The result has x's dtype, or under autocast the wider one, as torch's norms have there.
    """

    def __init__(self, width: int, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, eps, device=device, dtype=dtype)
        self.eps: float = eps

    def forward(self, x: Tensor) -> Tensor:
        """x normalised over its last dimension: (..., width)."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        out = add_norm(wide, None, self.weight, eps=self.eps, kind="rms").out
        return out if autocasts(x) else out.to(x.dtype)
