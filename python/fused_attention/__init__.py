"""Fused attention, forward and backward, and the transformer modules built on it.

from fused_attention import attention
out = attention(q, k, v, causal=True)        # (batch, heads, seqlen, head_dim)
"""

from importlib.metadata import PackageNotFoundError, version

from .backend import Explanation, backends
from .functional import attention, attention_varlen, attention_varlen_with_lse, attention_weights, attention_with_lse, explain, warmup
from .layers import MultiHeadAttention, TransformerLayer
from .merge import merge_attention
from .problem import AttentionOutput
from .sdpa import scaled_dot_product_attention

try:
    __version__ = version("fused-attention")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+source"

__all__ = [
    "AttentionOutput",
    "Explanation",
    "MultiHeadAttention",
    "TransformerLayer",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_weights",
    "attention_with_lse",
    "backends",
    "explain",
    "merge_attention",
    "scaled_dot_product_attention",
    "warmup",
]
