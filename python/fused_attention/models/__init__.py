"""Models built on these layers: short, readable, each with its paper; they train, and those that write decode with a cache."""

from .bert import BERT, BERTConfig, Cloze, hide_words
from .caches import Caches
from .checkpoint import load, save
from .generation import Hypotheses, beam_search, generate, stream
from .gpt import GPT, GPTConfig
from .log_mel import log_mel
from .pretrained import from_transformers
from .transformer import Transformer, TransformerConfig, warm_up
from .vilbert import ViLBERT, ViLBERTConfig
from .vit import ViT, ViTConfig
from .whisper import Whisper, WhisperConfig

__all__ = [
    "BERT",
    "GPT",
    "BERTConfig",
    "Caches",
    "Cloze",
    "GPTConfig",
    "Hypotheses",
    "Transformer",
    "TransformerConfig",
    "ViLBERT",
    "ViLBERTConfig",
    "ViT",
    "ViTConfig",
    "Whisper",
    "WhisperConfig",
    "beam_search",
    "from_transformers",
    "generate",
    "hide_words",
    "load",
    "log_mel",
    "save",
    "stream",
    "warm_up",
]
