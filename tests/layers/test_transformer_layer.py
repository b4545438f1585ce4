"""TransformerLayer beside torch's encoder layer: state dict, initial weights, results and gradients, and life inside torch's encoder."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attention.layers import MultiHeadAttention, TransformerLayer

D_MODEL, HEADS, HIDDEN, BATCH, SEQLEN = 8, 2, 16, 3, 5

CONSTRUCTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True, "batch_first": True},
    "gelu by name": {"activation": "gelu"},
    "another activation": {"activation": F.silu, "layer_norm_eps": 1e-3},
    "no bias": {"bias": False, "batch_first": True},
    "odd heads": {"nhead": 1, "norm_first": True},
}
constructions = pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
nested_is_a_prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def build(cls, options, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return cls(D_MODEL, **{"nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, **options}, dtype=dtype)


def build_pair(options):
    stock, ours = build(nn.TransformerEncoderLayer, options), build(TransformerLayer, options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def source(layer, batched=True):
    shape = (SEQLEN, D_MODEL) if not batched else (BATCH, SEQLEN, D_MODEL) if layer.self_attn.batch_first else (SEQLEN, BATCH, D_MODEL)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def later():
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)


def padding():
    hidden = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


def floating(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


MASKS = {
    "none": lambda heads: {},
    "bool": lambda heads: {"src_mask": later()},
    "bool and padding": lambda heads: {"src_mask": later(), "src_key_padding_mask": padding()},
    "padding": lambda heads: {"src_key_padding_mask": padding()},
    "float": lambda heads: {"src_mask": torch.linspace(-1, 1, SEQLEN**2, dtype=torch.float64).view(SEQLEN, SEQLEN)},
    "float and padding": lambda heads: {"src_mask": floating(later()), "src_key_padding_mask": floating(padding())},
    "3-D": lambda heads: {"src_mask": later().expand(BATCH * heads, -1, -1)},
    "causal by mask and hint": lambda heads: {"src_mask": later(), "is_causal": True},
}


@constructions
def test_state_dict_seed_and_generator(options):
    stock = build(nn.TransformerEncoderLayer, options)
    after_stock = torch.get_rng_state()
    ours = build(TransformerLayer, options)
    assert torch.equal(torch.get_rng_state(), after_stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in stock.state_dict().items())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    other = build(TransformerLayer, options, seed=9)
    stock.load_state_dict(other.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in other.state_dict().items())


def test_constructor_and_forward_take_torchs_arguments():
    stock = nn.TransformerEncoderLayer
    for name in ("__init__", "forward", "_sa_block", "_ff_block"):
        mine, theirs = (inspect.signature(getattr(cls, name)).parameters.values() for cls in (TransformerLayer, stock))
        positional = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]  # the extras are keyword-only
        assert [(p.name, p.kind, p.default) for p in positional] == [(p.name, p.kind, p.default) for p in theirs]
    layer = build(TransformerLayer, {})
    assert isinstance(layer, stock)
    assert type(layer.self_attn) is MultiHeadAttention
    assert layer.activation_relu_or_gelu == 1


@constructions
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_results_and_gradients_equal_torchs(options, masks):
    stock, ours = build_pair(options)
    call = masks(ours.self_attn.num_heads)
    results = []
    for layer in (stock, ours):
        x = source(layer).requires_grad_()
        out = layer(x, **call)
        gradients = torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), [x, *layer.parameters()]
        )
        results.append((out, gradients))
    torch.testing.assert_close(results[1], results[0])


@constructions
def test_unbatched_input_equals_torchs(options):
    stock, ours = build_pair(options)
    x = source(ours, batched=False)
    call = {"src_mask": later(), "src_key_padding_mask": torch.tensor([False, False, True, False, True])}
    torch.testing.assert_close(ours(x, **call), stock(x, **call))


def test_evaluation_equals_torchs_fast_path_where_nothing_is_padded():
    stock, ours = build_pair({"batch_first": True})
    x = source(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, src_mask=later()), stock.eval()(x, src_mask=later()))
        got, expected = (layer(x, src_key_padding_mask=padding()) for layer in (ours, stock))
        torch.testing.assert_close(got[~padding()], expected[~padding()])


def test_masks_of_two_dtypes_warn_as_torchs_do():
    for masks in (
        {"src_mask": floating(later()), "src_key_padding_mask": padding()},
        {"src_mask": later(), "src_key_padding_mask": floating(padding())},
    ):
        recorded = []
        for layer in build_pair({"batch_first": True}):
            with pytest.warns(UserWarning, match="mismatched") as caught:
                layer(source(layer), **masks)
            recorded.append([str(warning.message) for warning in caught])
        assert recorded[0] == recorded[1]


def test_bool_masks_of_both_kinds_warn_of_nothing():
    _, ours = build_pair({"batch_first": True})
    ours(source(ours), src_mask=later(), src_key_padding_mask=padding())  # a warning is an error here


def test_bool_masks_reach_the_attention_as_bool():
    """A byte an element instead of a float, and tiles that can be skipped."""
    _, ours = build_pair({"batch_first": True})
    seen = []
    ours.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["attn_mask"].dtype, kwargs["key_padding_mask"].dtype)), with_kwargs=True
    )
    ours(source(ours), src_mask=later(), src_key_padding_mask=padding())
    assert seen == [(torch.bool, torch.bool)]


def test_another_attention_gets_torchs_form_of_the_masks():
    for base in (nn.MultiheadAttention, MultiHeadAttention):

        class Attention(base):
            def forward(self, query, key, value, attn_mask=None, **call):
                assert attn_mask.dtype is torch.float64
                return super().forward(query, key, value, attn_mask=attn_mask, **call)

        stock, ours = build_pair({"batch_first": True})
        attention = Attention(D_MODEL, HEADS, batch_first=True, dtype=torch.float64)
        attention.load_state_dict(stock.self_attn.state_dict())
        ours.self_attn = attention
        torch.testing.assert_close(ours(source(ours), src_mask=later()), stock(source(ours), src_mask=later()))


def test_hooks_on_every_child_fire_once():
    _, ours = build_pair({"batch_first": True})
    fired = []
    for name, child in ours.named_modules():
        child.register_forward_hook(lambda *_, name=name: fired.append(name))
    with torch.no_grad():
        ours.eval()(source(ours))
    assert sorted(fired) == sorted(name for name, _ in ours.named_modules())


def test_an_overridden_block_on_one_instance_runs():
    _, ours = build_pair({"batch_first": True})
    x = source(ours)
    seen = []

    def block(x, attn_mask, key_padding_mask, is_causal=False):
        seen.append((attn_mask.dtype, key_padding_mask.dtype))
        return torch.zeros_like(x)

    ours._sa_block = block
    out = ours(x, src_mask=later(), src_key_padding_mask=padding())
    torch.testing.assert_close(out, ours.norm2(ours.norm1(x) + ours._ff_block(ours.norm1(x))))
    assert seen == [(torch.float64, torch.float64)]  # torch's form of the masks


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_active_in_training_alone(dropout):
    ours = build(TransformerLayer, {"dropout": dropout, "batch_first": True})
    x = source(ours)
    torch.manual_seed(0)
    first, second = ours(x), ours(x)
    assert torch.equal(first, second) == (dropout == 0.0)
    torch.manual_seed(0)
    assert torch.equal(ours(x), first)
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_pickle_deepcopy_meta_and_repr():
    stock, ours = build_pair({"activation": "gelu"})
    x = source(ours)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin.self_attn) is MultiHeadAttention
        torch.testing.assert_close(twin(x), ours(x), rtol=0, atol=0)
    names = repr(ours).replace("TransformerLayer", "TransformerEncoderLayer").replace("MultiHeadAttention", "MultiheadAttention")
    assert names == repr(stock)
    on_meta = TransformerLayer(D_MODEL, HEADS, device="meta")
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert on_meta(torch.zeros(SEQLEN, BATCH, D_MODEL, device="meta")).shape == (SEQLEN, BATCH, D_MODEL)


@nested_is_a_prototype
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_torchs_encoder_takes_our_layer(layers, norm_first, mode):
    """In evaluation a post-norm encoder nests the padded batch and fills what was padded with zeros: with our layers too."""
    stock, ours = build_pair({"batch_first": True, "norm_first": norm_first})
    nesting = not norm_first
    encoders = [
        nn.TransformerEncoder(layer, layers, nn.LayerNorm(D_MODEL, dtype=torch.float64), enable_nested_tensor=nesting)
        for layer in (stock, ours)
    ]
    x = source(ours)
    with torch.set_grad_enabled(mode != "no_grad"):
        for call in (
            {"src_key_padding_mask": padding()},
            {"mask": floating(later())},
            {"mask": later(), "src_key_padding_mask": padding()},
        ):
            expected, got = (encoder.train(mode == "train")(x, **call) for encoder in encoders)
            valid = ~call.get("src_key_padding_mask", torch.zeros(BATCH, SEQLEN, dtype=torch.bool))
            torch.testing.assert_close(got[valid], expected[valid])
            assert got.shape == expected.shape


@nested_is_a_prototype
def test_a_nested_batch_stays_nested_and_equals_its_members():
    stock, ours = build_pair({"batch_first": True})
    members = [source(ours)[0], source(ours)[1, :3]]
    nested = torch.nested.nested_tensor(members)
    with torch.no_grad():
        out = ours.eval()(nested)
        assert out.is_nested
        for got, member in zip(out.unbind(), members, strict=True):
            torch.testing.assert_close(got, stock.train()(member[None])[0])


def test_the_layer_reads_its_parts_at_every_call():
    stock, ours = build_pair({"batch_first": True})
    x = source(ours)
    ours(x)
    for layer in (stock, ours):
        layer.norm_first = True
        layer.activation = F.gelu
        layer.linear2.weight.data.mul_(2)
        layer.self_attn.in_proj_weight = nn.Parameter(layer.self_attn.in_proj_weight.detach() * 2)
    torch.testing.assert_close(ours(x), stock(x))


def test_a_training_run_equals_torchs():
    """Ten Adam steps of both layers from the same weights on the same batches."""
    losses = []
    for layer in build_pair({"batch_first": True}):
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(3)
        run = []
        for _ in range(10):
            x = torch.randn(BATCH, SEQLEN, D_MODEL, generator=generator, dtype=torch.float64)
            loss = (layer(x, src_mask=later(), src_key_padding_mask=padding()) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[1][0] > losses[1][-1]
    # Adam divides by the gradient's size, so that rounding grows step by step: a part in a million, of a loss of order one.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
