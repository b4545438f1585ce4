"""The transformer modules built on `attention`: subclasses of torch's, with the same parameters, arguments and results."""

from .multihead import MultiHeadAttention
from .transformer import TransformerLayer

__all__ = ["MultiHeadAttention", "TransformerLayer"]
