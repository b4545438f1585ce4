"""MultiHeadAttention beside torch's module: state dict, initial weights, results and gradients under every mask, shapes and layout."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from fused_attention.layers import MultiHeadAttention

EMBED_DIM, HEADS, BATCH, SEQLEN_Q, SEQLEN_K = 12, 3, 2, 5, 7

CONSTRUCTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "added bias": {"add_bias_kv": True},
    "added zero": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim": {"kdim": 5},
    "vdim": {"vdim": 10, "batch_first": True},
    "kdim and vdim": {"kdim": 5, "vdim": 10},
    "kdim, vdim, both added": {"kdim": 5, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True},
    "no bias, added bias": {"bias": False, "add_bias_kv": True, "batch_first": True},
    "no bias, kdim": {"bias": False, "kdim": 7, "batch_first": True},
    "dropout, even heads": {"num_heads": 4, "dropout": 0.25},
}

constructions = pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)


def build(cls, options, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return cls(EMBED_DIM, **{"num_heads": HEADS, **options}, dtype=dtype)


def build_pair(options, dtype=torch.float64):
    """The same weights in both, with biases that are not zero."""
    stock, ours = build(nn.MultiheadAttention, options, dtype), build(MultiHeadAttention, options, dtype)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(module, batched=True, dtype=torch.float64, seed=1, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)

    def draw(seqlen, features):
        shape = (seqlen, features) if not batched else (batch, seqlen, features) if module.batch_first else (seqlen, batch, features)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(seqlen_q, EMBED_DIM), draw(seqlen_k, module.kdim), draw(seqlen_k, module.vdim)


def attn_mask_of(kind, heads=HEADS, batch=BATCH):
    """None, or a mask that leaves the first key visible: torch gives NaN where nothing is."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(2)
    dtype, dims = kind.split()
    shape = (SEQLEN_Q, SEQLEN_K) if dims == "2-D" else (batch * heads, SEQLEN_Q, SEQLEN_K)
    hidden = torch.rand(shape, generator=generator) < 0.3
    hidden[..., 0] = False
    added = torch.randn(shape, generator=generator, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    return hidden if dtype == "bool" else added


def key_padding_mask_of(kind):
    if kind is None:
        return None
    hidden = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    hidden[1, 4:] = True
    if kind == "bool":
        return hidden
    return torch.linspace(-1, 1, BATCH * SEQLEN_K, dtype=torch.float64).view(BATCH, SEQLEN_K).masked_fill(hidden, float("-inf"))


def results(module, tensors, **call):
    """Output and weights, and the gradients of a loss on both with respect to inputs, floating masks and parameters."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    masks = {name: mask if mask is None else mask.clone() for name, mask in call.items() if name.endswith("mask")}
    leaves += [mask.requires_grad_() for mask in masks.values() if mask is not None and mask.is_floating_point()]
    out, weights = module(*leaves[:3], **{**call, **masks})
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(1, -2, weights.numel(), dtype=weights.dtype).view_as(weights)).sum()
    gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
    return out, weights, gradients


@constructions
def test_state_dict_goes_both_ways(options):
    stock, ours = build(nn.MultiheadAttention, options, seed=3), build(MultiHeadAttention, options, seed=4)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    before = copy.deepcopy(ours.state_dict())
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in stock.state_dict().items())
    stock.load_state_dict(before, strict=True)
    assert all(torch.equal(stock.state_dict()[name], value) for name, value in before.items())


@constructions
def test_a_seed_gives_the_same_weights_and_leaves_the_same_generator(options):
    stock = build(nn.MultiheadAttention, options, torch.float32)
    after_stock = torch.get_rng_state()
    ours = build(MultiHeadAttention, options, torch.float32)
    assert torch.equal(torch.get_rng_state(), after_stock)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in stock.state_dict().items())


def test_constructor_and_forward_take_torchs_arguments():
    for ours, stock in (
        (MultiHeadAttention.__init__, nn.MultiheadAttention.__init__),
        (MultiHeadAttention.forward, nn.MultiheadAttention.forward),
    ):
        mine, theirs = inspect.signature(ours).parameters.values(), inspect.signature(stock).parameters.values()
        positional = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]  # the extras are keyword-only
        assert [(p.name, p.kind, p.default) for p in positional] == [(p.name, p.kind, p.default) for p in theirs]
    assert issubclass(MultiHeadAttention, nn.MultiheadAttention)


@constructions
@pytest.mark.parametrize("key_padding", [None, "bool", "float"])
@pytest.mark.parametrize("attn", [None, "bool 2-D", "bool 3-D", "float 2-D", "float 3-D"])
def test_results_and_gradients_equal_torchs(options, attn, key_padding):
    options = {**options, "dropout": 0.0}
    stock, ours = build_pair(options)
    tensors = inputs(ours)
    masks = {"attn_mask": attn_mask_of(attn, ours.num_heads), "key_padding_mask": key_padding_mask_of(key_padding)}
    for need_weights, average in ((True, True), (True, False), (False, True)):
        call = {**masks, "need_weights": need_weights, "average_attn_weights": average}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the deprecation of masks of two dtypes has its own test
            expected, got = results(stock, tensors, **call), results(ours, tensors, **call)
        torch.testing.assert_close(got, expected)


@constructions
@pytest.mark.parametrize("attn", [None, "bool 2-D", "float 3-D"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_input_equals_torchs(options, attn, need_weights):
    stock, ours = build_pair({**options, "dropout": 0.0})
    tensors = inputs(ours, batched=False)
    call = {"attn_mask": attn_mask_of(attn, ours.num_heads, batch=1), "need_weights": need_weights, "average_attn_weights": False}
    if attn != "float 3-D":
        call["key_padding_mask"] = torch.tensor([False] * 4 + [True] * (SEQLEN_K - 4))
    expected, got = results(stock, tensors, **call), results(ours, tensors, **call)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("identical", ["query is key is value", "key is value", "query is key"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_identical_inputs_share_a_projection_and_change_nothing(identical, batch_first):
    stock, ours = build_pair({"batch_first": batch_first})
    first, second, _ = inputs(ours, seqlen_k=SEQLEN_Q)
    first.requires_grad_()
    second.requires_grad_()
    tensors = {
        "query is key is value": (first, first, first),
        "key is value": (first, second, second),
        "query is key": (first, first, second),
    }
    expected, got = stock(*tensors[identical]), ours(*tensors[identical])
    torch.testing.assert_close(got, expected)
    g = torch.linspace(-1, 1, expected[0].numel(), dtype=torch.float64).view_as(expected[0])
    wanted = [first, *stock.parameters()]
    mine = [first, *ours.parameters()]
    torch.testing.assert_close(torch.autograd.grad((got[0] * g).sum(), mine), torch.autograd.grad((expected[0] * g).sum(), wanted))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_evaluation_equals_torchs_fast_path(batch_first, need_weights):
    stock, ours = build_pair({"batch_first": batch_first, "num_heads": 4}, torch.float32)
    x, *_ = inputs(ours, dtype=torch.float32)
    hidden = torch.zeros(BATCH, SEQLEN_Q, dtype=torch.bool)
    hidden[1, 3:] = True
    with torch.no_grad():
        expected = stock.eval()(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        got = ours.eval()(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_deviation_the_output_is_contiguous_in_every_mode(batch_first, mode):
    ours = build(MultiHeadAttention, {"batch_first": batch_first})
    ours.train(mode == "train")
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        out, weights = ours(*inputs(ours))
    assert out.is_contiguous()
    assert weights.is_contiguous()
    assert out.shape == inputs(ours)[0].shape


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True}])
def test_training_equals_evaluation_without_dropout(options):
    ours = build(MultiHeadAttention, options)
    tensors = inputs(ours)
    mask, padding = attn_mask_of("bool 2-D"), key_padding_mask_of("bool")
    call = {"attn_mask": mask, "key_padding_mask": padding}
    expected = ours.train()(*tensors, **call)
    for guard in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with guard():
            torch.testing.assert_close(ours.eval()(*tensors, **call), expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sizes", [(0, 7, 2), (5, 0, 2), (5, 7, 0), (0, 0, 0), (1, 1, 1)])
def test_empty_sizes(sizes, need_weights):
    """No keys: the output is out_proj's bias."""
    seqlen_q, seqlen_k, batch = sizes
    for options in ({}, {"batch_first": True}, {"add_zero_attn": True}):
        stock, ours = build_pair(options)
        tensors = inputs(ours, seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=batch)
        torch.testing.assert_close(ours(*tensors, need_weights=need_weights), stock(*tensors, need_weights=need_weights))
        loss = ours(*(tensor.requires_grad_() for tensor in tensors), need_weights=need_weights)[0].sum()
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dtypes_of_results(dtype, need_weights):
    """Half precision rounds in other places than torch's: its distance from fp64 is the measure."""
    exact, _ = build_pair({"batch_first": True})
    ours = build(MultiHeadAttention, {"batch_first": True}, dtype)
    ours.load_state_dict({name: value.to(dtype) for name, value in exact.state_dict().items()})
    stock = build(nn.MultiheadAttention, {"batch_first": True}, dtype)
    stock.load_state_dict(ours.state_dict())
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    tensors = inputs(ours, dtype=dtype)
    padding = key_padding_mask_of("bool")
    out, weights = ours(*tensors, key_padding_mask=padding, need_weights=need_weights)
    assert out.dtype is dtype
    assert weights is None or weights.dtype is dtype
    truth = exact(*(tensor.double() for tensor in tensors), key_padding_mask=padding)[0]
    theirs = stock(*tensors, key_padding_mask=padding, need_weights=need_weights)[0]
    floor = 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (out.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


def test_a_float32_mask_on_half_precision_is_served_where_torch_serves_it():
    ours = build(MultiHeadAttention, {}, torch.bfloat16)
    stock = build(nn.MultiheadAttention, {}, torch.bfloat16)
    tensors = inputs(ours, dtype=torch.bfloat16)
    mask = attn_mask_of("float 2-D").float()
    served = []
    ours.out_proj.register_forward_hook(lambda *_: served.append(True))  # torch's forward would not call it
    torch.testing.assert_close(
        ours(*tensors, attn_mask=mask, need_weights=False), stock(*tensors, attn_mask=mask, need_weights=False), rtol=2**-6, atol=2**-7
    )
    assert served


def test_masks_of_two_dtypes_warn_as_torchs_do():
    stock, ours = build_pair({})
    tensors = inputs(ours)
    for attn, padding in (("float 2-D", "bool"), ("bool 2-D", "float")):
        recorded = []
        for module in (stock, ours):
            with pytest.warns(UserWarning, match="mismatched") as caught:
                module(*tensors, attn_mask=attn_mask_of(attn), key_padding_mask=key_padding_mask_of(padding))
            recorded.append([str(warning.message) for warning in caught])
        assert recorded[0] == recorded[1]


def test_masks_are_not_modified():
    ours = build(MultiHeadAttention, {"add_bias_kv": True})
    masks = [attn_mask_of("bool 3-D"), key_padding_mask_of("bool")]
    before = [mask.clone() for mask in masks]
    ours(*inputs(ours), attn_mask=masks[0], key_padding_mask=masks[1], is_causal=True)
    assert all(torch.equal(mask, copied) for mask, copied in zip(masks, before, strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_inputs_of_any_strides(batch_first):
    stock, ours = build_pair({"batch_first": batch_first})
    tensors = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs(ours)]
    tensors[1] = torch.stack([tensors[1], tensors[1]], -1)[..., 0]
    mask = attn_mask_of("float 3-D").transpose(1, 2).contiguous().transpose(1, 2)
    padding = torch.stack([key_padding_mask_of("float")] * 2, -1)[..., 0]
    torch.testing.assert_close(
        results(ours, tensors, attn_mask=mask, key_padding_mask=padding), results(stock, tensors, attn_mask=mask, key_padding_mask=padding)
    )
