"""Where the modules mean to differ from torch's, one test a deviation; each shows what torch does beside it."""

import pytest
import torch
from torch import nn

from fused_attention.layers import MultiHeadAttention, TransformerLayer

EMBED_DIM, HEADS, BATCH, SEQLEN = 8, 2, 3, 5

GUARDS = {"train": torch.enable_grad, "eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}

modes = pytest.mark.parametrize("mode", GUARDS)
weights_or_not = pytest.mark.parametrize("need_weights", [True, False])


def build_pair(batch_first=True, **options):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=batch_first, dtype=torch.float64, **options)
    ours = MultiHeadAttention(EMBED_DIM, HEADS, batch_first=batch_first, dtype=torch.float64, **options)
    with torch.no_grad():
        stock.out_proj.bias.copy_(torch.linspace(-1, 1, EMBED_DIM))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def build_layers(**options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    stock, ours = (cls(EMBED_DIM, HEADS, 16, **options) for cls in (nn.TransformerEncoderLayer, TransformerLayer))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def sequence(*shape):
    return torch.randn(shape or (BATCH, SEQLEN, EMBED_DIM), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def later(seqlen_q=SEQLEN, seqlen_k=SEQLEN):
    return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)


def padding():
    hidden = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


@modes
@weights_or_not
@pytest.mark.parametrize("masks", ["no mask", "bool padding", "float padding", "bool attn_mask", "float attn_mask"])
def test_deviation_is_causal_is_obeyed_with_and_without_masks(mode, need_weights, masks):
    stock, ours = build_pair()
    x = sequence()
    added = torch.linspace(-1, 1, SEQLEN * SEQLEN, dtype=torch.float64).view(SEQLEN, SEQLEN)
    some = torch.zeros(SEQLEN, SEQLEN, dtype=torch.bool)
    some[3, 1] = True
    float_later = torch.zeros(SEQLEN, SEQLEN, dtype=torch.float64).masked_fill(later(), float("-inf"))
    float_padding = torch.zeros(BATCH, SEQLEN, dtype=torch.float64).masked_fill(padding(), float("-inf"))
    given, explicit = {
        "no mask": ({}, {"attn_mask": later()}),
        "bool padding": ({"key_padding_mask": padding()}, {"key_padding_mask": padding(), "attn_mask": later()}),
        "float padding": ({"key_padding_mask": float_padding}, {"key_padding_mask": float_padding, "attn_mask": float_later}),
        "bool attn_mask": ({"attn_mask": some}, {"attn_mask": some | later()}),
        "float attn_mask": ({"attn_mask": added}, {"attn_mask": added + float_later}),
    }[masks]
    expected = stock.train()(x, x, x, need_weights=need_weights, **explicit)
    with GUARDS[mode]():
        got = ours.train(mode == "train")(x, x, x, need_weights=need_weights, is_causal=True, **given)
        torch.testing.assert_close(got, expected)
        if masks == "no mask" and mode == "no_grad":
            unmasked = stock.eval()(x, x, x, need_weights=need_weights)[0]
            torch.testing.assert_close(stock(x, x, x, need_weights=need_weights, is_causal=True)[0], unmasked)  # torch forgets the hint


@weights_or_not
@pytest.mark.parametrize("sizes", [(4, 7), (7, 4)])
def test_deviation_is_causal_starts_at_the_first_key(sizes, need_weights):
    stock, ours = build_pair()
    query, key = sequence(BATCH, sizes[0], EMBED_DIM), sequence(BATCH, sizes[1], EMBED_DIM)
    expected = stock(query, key, key, attn_mask=later(*sizes), need_weights=need_weights)
    torch.testing.assert_close(ours(query, key, key, is_causal=True, need_weights=need_weights), expected)
    unbatched = ours(query[0], key[0], key[0], is_causal=True, need_weights=need_weights)[0]
    torch.testing.assert_close(unbatched, expected[0][0])


@weights_or_not
@pytest.mark.parametrize("added", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_deviation_added_columns_stay_visible_to_causal_queries(added, need_weights):
    stock, ours = build_pair(**added)
    x = sequence()
    expected, weights = stock(x, x, x, attn_mask=later())
    got = ours(x, x, x, is_causal=True, need_weights=need_weights, key_padding_mask=torch.zeros(BATCH, SEQLEN, dtype=torch.bool))
    torch.testing.assert_close(got, (expected, weights if need_weights else None))
    hidden = stock(x, x, x, attn_mask=later(), is_causal=True, need_weights=False)[0]
    assert not torch.allclose(hidden, expected)  # torch masks the added columns with the hint alone


@weights_or_not
@modes
@pytest.mark.parametrize("hiding", ["bool padding", "float padding", "bool attn_mask", "float attn_mask"])
def test_deviation_a_query_that_sees_nothing_gives_zeros_before_the_output_projection(hiding, need_weights, mode):
    stock, ours = build_pair()
    x = sequence()
    hidden = torch.zeros((BATCH, SEQLEN) if "padding" in hiding else (SEQLEN, SEQLEN), dtype=torch.bool)
    hidden[1] = True
    name = "key_padding_mask" if "padding" in hiding else "attn_mask"
    given = {
        name: hidden if hiding.startswith("bool") else torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    }
    with GUARDS[mode]():
        out, weights = ours.train(mode == "train")(x, x, x, need_weights=need_weights, **given)
    blind = out[1] if "padding" in hiding else out[:, 1]
    torch.testing.assert_close(blind, ours.out_proj.bias.expand_as(blind))
    assert torch.isfinite(out).all()
    if need_weights:
        assert ((weights[1] if "padding" in hiding else weights[:, 1]) == 0).all()
        assert torch.isfinite(weights).all()
        assert stock(x, x, x, **given)[0].isnan().any()


@weights_or_not
def test_deviation_gradients_stay_finite_beside_a_query_that_sees_nothing(need_weights):
    stock, ours = build_pair()
    hidden = padding()
    hidden[1] = True
    gradients = []
    for module in (stock, ours):
        x = sequence().requires_grad_()
        out, weights = module(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        loss = out[0].sum() + (weights[0].square().sum() if need_weights else 0.0)
        gradients.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    assert all(torch.isfinite(gradient).all() for gradient in gradients[1])
    assert (gradients[1][0][1] == 0).all()
    if need_weights:
        assert gradients[0][1].isnan().any()


def test_deviation_hooks_on_the_output_projection_run():
    calls = []
    stock, ours = build_pair()
    for module, expected in ((stock, 0), (ours, 2)):
        calls.clear()
        module.out_proj.register_forward_hook(lambda *_: calls.append(1))
        for mode in (True, False):
            module.train(mode)(sequence(), sequence(), sequence())
        assert len(calls) == expected


def test_deviation_the_output_projection_can_be_replaced():
    """A low-rank adapter around out_proj, as fine-tuning libraries put there."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base(x) * 2

    stock, ours = build_pair()
    x = sequence()
    plain = ours(x, x, x)[0]
    for module in (stock, ours):
        module.out_proj = Adapter(module.out_proj)
    torch.testing.assert_close(ours(x, x, x)[0], plain * 2)
    torch.testing.assert_close(stock(x, x, x)[0], plain)


@pytest.mark.parametrize("norm_first", [False, True])
@modes
def test_deviation_overridden_blocks_run_in_evaluation(norm_first, mode):
    calls = []

    def override(base):
        class Layer(base):
            def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
                calls.append(
                    (
                        "attention",
                        None if attn_mask is None else attn_mask.dtype,
                        None if key_padding_mask is None else key_padding_mask.dtype,
                    )
                )
                return super()._sa_block(x, attn_mask, key_padding_mask, is_causal=is_causal) * 0.5

            def _ff_block(self, x):
                calls.append(("feed forward", None, None))
                return super()._ff_block(x) * 0.25

        return Layer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)

    stock, ours = override(nn.TransformerEncoderLayer), override(TransformerLayer)
    ours.load_state_dict(stock.state_dict())
    expected = stock(sequence(), src_mask=later(), src_key_padding_mask=padding())
    as_torch_calls, calls = calls, []
    with GUARDS[mode]():
        got = ours.train(mode == "train")(sequence(), src_mask=later(), src_key_padding_mask=padding())
    torch.testing.assert_close(got, expected)
    assert calls == as_torch_calls
    assert calls[0] == ("attention", torch.float64, torch.float64)  # an override gets torch's floating form of the masks


def test_deviation_torch_ignores_overridden_blocks_in_evaluation():
    """The behaviour the test above departs from; once torch changes it, the deviation is none."""

    class Layer(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            raise AssertionError("called")

    with torch.no_grad():
        Layer(EMBED_DIM, HEADS, 16, batch_first=True).eval()(torch.zeros(BATCH, SEQLEN, EMBED_DIM))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_deviation_evaluation_equals_training_at_padded_positions_too(norm_first, causal):
    _, ours = build_layers(norm_first=norm_first)
    x = sequence()
    expected = ours.train()(x, src_key_padding_mask=padding(), is_causal=causal)
    for guard in GUARDS.values():
        with guard():
            torch.testing.assert_close(ours.eval()(x, src_key_padding_mask=padding(), is_causal=causal), expected)


@modes
@pytest.mark.parametrize("masked", [False, True])
def test_deviation_causal_layer_without_a_mask(mode, masked):
    stock, ours = build_layers()
    x = sequence()
    call = {"src_key_padding_mask": padding()} if masked else {}
    expected = stock.train()(x, src_mask=later(), **call)
    with GUARDS[mode]():
        torch.testing.assert_close(ours.train(mode == "train")(x, is_causal=True, **call), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_deviation_cpu_autocast_is_seen_in_evaluation():
    """torch asks for autocast without naming the CPU, and takes a fast path that fails on the nested batch its encoder makes."""
    layers = build_layers(dtype=torch.float32)
    stock, ours = (nn.TransformerEncoder(layer, 2).eval() for layer in layers)
    x = sequence().float()
    with torch.no_grad():
        expected = ours(x, src_key_padding_mask=padding())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(RuntimeError):
                stock(x, src_key_padding_mask=padding())
            got = ours(x, src_key_padding_mask=padding())
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=32 * torch.finfo(torch.bfloat16).eps)


def test_deviation_the_fast_path_switch_governs_torchs_operators_only():
    _, ours = build_pair()
    x = sequence()
    expected = ours.eval()(x, x, x)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(not enabled)
    try:
        torch.testing.assert_close(ours(x, x, x), expected, rtol=0, atol=0)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_deviation_nested_tensors_can_be_causal():
    stock, ours = build_pair()
    members = [sequence()[0], sequence()[1, :3]]
    nested = torch.nested.nested_tensor(members)
    with torch.no_grad():
        out, _ = ours.eval()(nested, nested, nested, need_weights=False, is_causal=True)
        for got, member in zip(out.unbind(), members, strict=True):
            torch.testing.assert_close(got, stock(member, member, member, attn_mask=later(len(member), len(member)))[0])


@modes
@pytest.mark.parametrize("average", [True, False])
def test_deviation_asking_for_weights_leaves_the_output_as_it_is(mode, average):
    """torch's output then comes from another path, of other roundings, and NaN where a query sees nothing."""
    stock, ours = build_pair()
    hidden = padding()
    hidden[2] = True
    with GUARDS[mode]():
        outs = [
            ours.train(mode == "train")(*(sequence(),) * 3, need_weights=need, average_attn_weights=average, key_padding_mask=hidden)[0]
            for need in (True, False)
        ]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    with torch.enable_grad():
        theirs = [stock.train()(*(sequence(),) * 3, need_weights=need, key_padding_mask=hidden)[0] for need in (True, False)]
    assert theirs[0].isnan().any()
    assert not theirs[1].isnan().any()
