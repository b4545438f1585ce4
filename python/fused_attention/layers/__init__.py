"""The transformer modules built on `attention`: subclasses of torch's, with the same parameters, arguments and results."""

from .decoder import TransformerDecoderLayer
from .multihead import MultiHeadAttention
from .replace import Report, replace_modules, restore_modules
from .stacks import Transformer, TransformerDecoder, TransformerEncoder
from .transformer import TransformerLayer

__all__ = [
    "MultiHeadAttention",
    "Report",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerLayer",
    "replace_modules",
    "restore_modules",
]
