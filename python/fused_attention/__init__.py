"""Fused attention, forward and backward, and the transformer modules built on it.

from fused_attention import attention
out = attention(q, k, v, causal=True)        # (batch, heads, seqlen, head_dim)
"""

from importlib.metadata import PackageNotFoundError, version

from .backend import Explanation, backends
from .cache import KVCache
from .decoding import attention_with_cache
from .explanation import explain
from .functional import attention, attention_varlen, attention_varlen_with_lse, attention_weights, attention_with_lse, warmup
from .layers import (
    MultiHeadAttention,
    Report,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerLayer,
    replace_modules,
    restore_modules,
)
from .merge import merge_attention
from .paging import PagedKVCache
from .problem import AttentionOutput
from .rotary import Rotary, apply_rotary
from .sdpa import scaled_dot_product_attention

try:
    __version__ = version("fused-attention")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+source"

__all__ = [
    "AttentionOutput",
    "Explanation",
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
    "Report",
    "Rotary",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerLayer",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_weights",
    "attention_with_cache",
    "attention_with_lse",
    "backends",
    "explain",
    "merge_attention",
    "replace_modules",
    "restore_modules",
    "scaled_dot_product_attention",
    "warmup",
]
