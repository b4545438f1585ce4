"""torch's own samples of its modules (torch.testing's module_db), run against our classes.

The database is read with torch's classes and each sample built of ours from the same arguments, so that torch's answer stands beside.
"""

import copy
import importlib.util
import pickle
import sys
import types
import unittest
import warnings

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, Transformer, TransformerDecoderLayer, TransformerEncoder, TransformerLayer, replace_modules


def read_database():
    """module_db; what importing torch's test utilities changes for the whole process is put back."""
    if importlib.util.find_spec("expecttest") is None:  # the base of torch's own test cases, of which none runs here
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase
    mutable = getattr(torch.backends, "__allow_nonbracketed_mutation_flag")
    script_calls = [(kind, kind.__call__) for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what other modules deprecate
        from torch.testing._internal.common_modules import module_db
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", mutable)
    for kind, call in script_calls:
        kind.__call__ = call
    return module_db


OURS = {
    nn.MultiheadAttention: MultiHeadAttention,
    nn.TransformerEncoderLayer: TransformerLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.Transformer: Transformer,
}
ENTRIES = {info.name: info for info in read_database() if info.module_cls in OURS}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def samples(info, training, dtype=torch.float64):
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def build(cls, sample, dtype=torch.float64, device="cpu"):
    """A module of one seed's weights; torch's samples of an encoder bring the layer that it copies."""
    torch.manual_seed(0)
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    if not issubclass(cls, nn.TransformerEncoder):
        return cls(*args, **{**kwargs, "dtype": dtype, "device": device})
    encoder = cls(*args, **kwargs).to(dtype=dtype, device=device)
    if cls is TransformerEncoder:
        replace_modules(encoder)
    return encoder


def run(module, sample):
    arguments = copy_of((sample.forward_input.args, sample.forward_input.kwargs))
    out = module(*arguments[0], **arguments[1])
    leaves = [tensor for tensor in (*arguments[0], *arguments[1].values()) if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    return out, leaves


def copy_of(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: copy_of(item) for name, item in value.items()}
    return tuple(copy_of(item) for item in value) if isinstance(value, tuple) else value


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module


def tensors_of(out):
    return [tensor for tensor in (out if isinstance(out, tuple) else (out,)) if tensor is not None]


def sees_nothing(expected):
    """torch answers NaN where a query sees no key, which has tests of its own."""
    return any(tensor.isnan().any() for tensor in tensors_of(expected))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ENTRIES)
def test_forward_and_gradients_equal_torchs(name, training):
    info, compared = ENTRIES[name], 0
    for sample in samples(info, training):
        stock, ours = (without_dropout(build(cls, sample)).train(training) for cls in (info.module_cls, OURS[info.module_cls]))
        (expected, their_leaves), (got, leaves) = run(stock, sample), run(ours, sample)
        if sees_nothing(expected):
            continue
        torch.testing.assert_close(got, expected, msg=lambda text, sample=sample: f"{sample.desc}: {text}")
        losses = [sum(tensor.square().sum() for tensor in tensors_of(out)) for out in (expected, got)]
        theirs = torch.autograd.grad(losses[0], [*their_leaves, *stock.parameters()])
        torch.testing.assert_close(torch.autograd.grad(losses[1], [*leaves, *ours.parameters()]), theirs)
        compared += 1
    assert compared >= 30


@pytest.mark.parametrize("name", ENTRIES)
def test_factory_arguments_pickle_and_repr(name):
    info = ENTRIES[name]
    for sample in samples(info, training=False):
        ours = build(OURS[info.module_cls], sample, torch.float32)
        assert all(parameter.dtype is torch.float32 for parameter in ours.parameters())
        twin = pickle.loads(pickle.dumps(ours))
        assert repr(twin) == repr(ours)
        on_meta = [build(OURS[info.module_cls], sample, device="meta")]
        if info.module_cls is not nn.TransformerEncoder:  # which copies a layer made before
            with torch.device("meta"):
                on_meta.append(build(OURS[info.module_cls], sample, device=None))
        assert all(parameter.is_meta for module in on_meta for parameter in module.parameters())


@pytest.mark.parametrize("name", ENTRIES)
def test_inputs_that_are_not_contiguous(name):
    def spread(value):
        if isinstance(value, torch.Tensor) and value.dim():
            return torch.stack([value.detach(), value.detach()], -1)[..., 0].requires_grad_(value.requires_grad)
        return value

    info = ENTRIES[name]
    for sample in samples(info, training=True):
        ours = without_dropout(build(OURS[info.module_cls], sample))
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        spread_out = ours(*map(spread, args), **{key: spread(value) for key, value in kwargs.items()})
        torch.testing.assert_close(spread_out, ours(*args, **kwargs))


@pytest.mark.parametrize("name", ENTRIES)
def test_training_and_evaluation_differ_where_dropout_is_on(name):
    info = ENTRIES[name]
    sample = next(iter(samples(info, training=True)))
    ours = copy.deepcopy(build(OURS[info.module_cls], sample))
    for part in ours.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.5
    torch.manual_seed(0)
    trained, evaluated = (tensors_of(run(ours.train(mode), sample)[0])[0] for mode in (True, False))
    assert not torch.equal(trained, evaluated)


@pytest.mark.parametrize("name", ENTRIES)
def test_second_derivatives(name):
    """One sample in four: each runs the module dozens of times."""
    info = ENTRIES[name]
    for sample in list(samples(info, training=True))[::4]:
        ours = without_dropout(build(OURS[info.module_cls], sample))
        args, kwargs = copy_of((sample.forward_input.args, sample.forward_input.kwargs))
        if sees_nothing(ours(*args, **kwargs)):
            continue

        def call(query, ours=ours, args=args, kwargs=kwargs):
            arguments = tuple(query if argument is args[0] else argument for argument in args) if args else ()
            return tuple(tensors_of(ours(*arguments, **kwargs)))

        if args:
            assert torch.autograd.gradgradcheck(call, (args[0].detach().requires_grad_(),), fast_mode=True)
