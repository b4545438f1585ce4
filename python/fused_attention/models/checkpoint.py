"""A model as a file: its weights as safetensors, with its class and its config in the header.

save(model, "gpt.safetensors")        model = load("gpt.safetensors")
"""

import dataclasses
import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .transformer import Transformer, TransformerConfig
from .vilbert import ViLBERT, ViLBERTConfig
from .vit import ViT, ViTConfig
from .whisper import Whisper, WhisperConfig

MODELS: dict[str, tuple[Any, Any]] = {
    "BERT": (BERT, BERTConfig),
    "GPT": (GPT, GPTConfig),
    "Transformer": (Transformer, TransformerConfig),
    "ViLBERT": (ViLBERT, ViLBERTConfig),
    "ViT": (ViT, ViTConfig),
    "Whisper": (Whisper, WhisperConfig),
}


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a model of this package; it needs the safetensors package.

    Raises:
        TypeError: the model is none of this package's, or of other layers than its config makes.
    """
    name = type(model).__name__
    if name not in MODELS or type(model) is not MODELS[name][0]:
        raise TypeError(f"model is a {name}, expected one of {', '.join(MODELS)}: save others with safetensors.torch.save_model")
    config: Any = model.config
    with torch.device("meta"):
        made = MODELS[name][0](config)
    if _anatomy(made) != _anatomy(model):
        raise TypeError(f"model is a {name} of other layers than its config makes, which load could not know: save its state_dict instead")
    header = {"model": name, "config": json.dumps(dataclasses.asdict(config))}
    weights = {key: weight.contiguous() for key, weight in model.state_dict().items()}
    _part("safetensors.torch").save_file(weights, path, header)


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model that `save` wrote, in evaluation mode; no code in the file is run.

    Raises:
        ValueError: the file holds weights that `save` did not write.
    """
    with _part("safetensors").safe_open(path, "pt", device=str(device)) as file:
        header = file.metadata() or {}
        if header.get("model") not in MODELS or "config" not in header:
            raise ValueError(f"{path} has the header {header}, expected a model of {', '.join(MODELS)} with its config, as save writes it")
        model, config = MODELS[header["model"]]
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
    restored: nn.Module = model(config(**json.loads(header["config"])))
    restored.to(next(iter(weights.values()))).load_state_dict(weights, assign=True)
    return restored.eval()


def _anatomy(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """What a model computes with, besides its weights: its modules and their settings, such as heads, activations and extras."""
    return [(name, type(each), _settings(each)) for name, each in model.named_modules()]


def _settings(module: nn.Module) -> dict[str, Any]:
    found = {name: value for name, value in vars(module).items() if name == "_fused_extras" or not name.startswith("_")}
    del found["training"]
    # Two partial functions are equal only if they are the same object.
    return {name: (value.func, value.args, value.keywords) if isinstance(value, partial) else value for name, value in found.items()}


def _part(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError("safetensors is not installed, and models are saved in its format: pip install safetensors") from None
