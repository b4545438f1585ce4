"""The swap of torch's attention modules for ours inside a model, in place, and back.

    module.__class__ = MultiHeadAttention        of every module whose class is nn.MultiheadAttention, and so on

so that parameters, buffers, hooks, names, devices and an optimizer's references stay the objects they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from .decoder import TransformerDecoderLayer
from .multihead import MultiHeadAttention
from .stacks import Transformer, TransformerDecoder, TransformerEncoder
from .transformer import TransformerLayer

# nn.Transformer stays: it only calls its two stacks. Read at import: users do assign nn.MultiheadAttention = MultiHeadAttention.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiHeadAttention,
    nn.TransformerEncoderLayer: TransformerLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
}
ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in COUNTERPARTS.items()} | {Transformer: nn.Transformer}


@dataclass(frozen=True)
class Report:
    """What a swap did: the names of the modules whose class changed, and for those it passed over the reason. The model itself is ""."""

    replaced: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        names = [name or "(the model itself)" for name in self.replaced]
        lines = [f"replaced {len(names)}: {', '.join(names)}" if names else "replaced nothing"]
        lines += [f"skipped {name or '(the model itself)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def replace_modules(model: nn.Module, *, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Turns every attention, encoder or decoder layer and stack of torch's in a model, itself included, into ours, in place.

    Nothing but the class of a module changes. Swap before parametrising, sharding or quantising. A model compiled before the swap
    compiles again. In evaluation torch's layers do not call their attention: an attention is served only if its layer is swapped too.

    Args:
        filter_fn: called with each candidate and its name in the model; False leaves it as it is.

    Returns:
        What changed, and what did not and why: modules of a subclass, of a class made at run time, or with a forward of their own.

    Raises:
        TypeError: model is no nn.Module.
    """
    return _swap(model, COUNTERPARTS, filter_fn)


def restore_modules(model: nn.Module) -> Report:
    """Turns every module of ours in a model, itself included, into torch's, in place: the inverse of `replace_modules`, bit for bit.

    For what names or matches classes: pickles of whole modules, quantisation, export to other systems.

    Returns:
        What changed, and what did not and why, as `replace_modules`.

    Raises:
        ValueError: a module has options that torch's class lacks; nothing is changed then.
        TypeError: model is no nn.Module.
    """
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            base = _base(module, ORIGINALS)
            extras = None if base is None else getattr(module, "_fused_extras", None)
            if base is not None and extras is not None:
                raise ValueError(
                    f"{name or 'the model itself'} is a {type(module).__name__} with {', '.join(extras.given())}, which "
                    f"{ORIGINALS[base].__name__} does not have: call restore_modules on the other parts of the model"
                )
    return _swap(model, ORIGINALS, None)


def _swap(
    model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]], filter_fn: Callable[[nn.Module, str], bool] | None
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    swaps: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        base = _base(module, classes)
        if base is None:
            continue
        reason = _why_not(module, base, classes[base])
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn returned False"
        if reason is None:
            swaps[name] = module
        else:
            skipped[name] = reason
    for module in swaps.values():
        module.__class__ = classes[type(module)]
    return Report(tuple(swaps), skipped)


def _base(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> type[nn.Module] | None:
    """The class to swap that the module is of or derives from, if it does not derive from what it would become."""
    for cls in type(module).__mro__:
        if cls in classes or cls in classes.values():
            return cls if cls in classes else None
    return None


def _why_not(module: nn.Module, base: type[nn.Module], other: type[nn.Module]) -> str | None:
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls is not base and cls.__module__.startswith("torch."):
        return f"{name} was derived from {base.__name__} by torch: swap before parametrising, sharding or quantising"
    if cls is not base:
        return f"{name} is a subclass of {base.__name__} and may rely on what it overrides: derive it from {other.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, which its class does not reach: swap first"
    return None
