"""What is done to modules: calls handed to torch, autocast, checkpointing, torch.func, hooks, parametrisation, and a swap of the class."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from fused_attention.layers import MultiHeadAttention, TransformerLayer, replace_modules, restore_modules

EMBED_DIM, HEADS, BATCH, SEQLEN = 8, 2, 3, 5


def build_pair(dtype=torch.float64, **options):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=dtype, **options)
    ours = MultiHeadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=dtype, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def sequence(dtype=torch.float64, seed=1):
    return torch.randn(BATCH, SEQLEN, EMBED_DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def later():
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)


def padding():
    hidden = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_attention_cannot_take_goes_to_torch_bit_for_bit(need_weights, mode):
    """torch adds an in_proj_bias of another dtype, where its linear layer takes the long way; a mixture that it computes."""
    stock, ours = build_pair(torch.float32)
    for module in (stock, ours):
        module.train(mode == "train")
        module.in_proj_bias = nn.Parameter(module.in_proj_bias.double() + 0.1)
    x = sequence(torch.float32)
    call = {"need_weights": need_weights, "key_padding_mask": padding()}
    torch.testing.assert_close(ours(x, x, x, **call), stock(x, x, x, **call), rtol=0, atol=0)
    causal = ours(x, x, x, **call, is_causal=True)
    torch.testing.assert_close(causal, stock(x, x, x, **call, attn_mask=later()), rtol=0, atol=0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_half_precision_value_of_another_dtype_is_torchs_to_judge(need_weights):
    stock, ours = build_pair(torch.float32)
    x = sequence(torch.float32)
    for module in (stock, ours):
        with pytest.raises(RuntimeError, match="dtype"):
            module(x, x, x.half(), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_mask_on_another_device_is_torchs_to_judge(need_weights):
    """torch lets the meta device spread, and refuses others."""
    stock, ours = build_pair()
    x = sequence()
    expected, got = (module(x, x, x, attn_mask=later().to("meta"), need_weights=need_weights)[0] for module in (stock, ours))
    assert got.device == expected.device


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_inputs_go_to_torch():
    stock, ours = (module.to(torch.complex64) for module in build_pair(torch.float32))
    x = torch.complex(sequence(torch.float32), sequence(torch.float32, seed=2))
    outcomes = []
    for module in (stock, ours):
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            module(x, x, x, need_weights=False)
        outcomes.append((type(caught.value), str(caught.value)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_nested_batch_in_evaluation_equals_torchs(need_weights):
    stock, ours = (module.eval() for module in build_pair())
    nested = torch.nested.nested_tensor([sequence()[0], sequence()[1, :3]])
    with torch.no_grad():
        expected, got = (module(nested, nested, nested, need_weights=need_weights) for module in (stock, ours))
    torch.testing.assert_close(got[0].to_padded_tensor(0.0), expected[0].to_padded_tensor(0.0), rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_autocast_in_training(need_weights, options, mask):
    stock, ours = build_pair(torch.float32, **options)
    exact, _ = build_pair(torch.float64, **options)
    given = (
        {}
        if mask is None
        else {"attn_mask": later() if mask == "bool" else torch.zeros(SEQLEN, SEQLEN).masked_fill(later(), float("-inf"))}
    )
    truth = exact(*(sequence(),) * 3, attn_mask=None if mask is None else later())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = ours(*(sequence(torch.float32),) * 3, need_weights=need_weights, **given)
        theirs, their_weights = stock(*(sequence(torch.float32),) * 3, need_weights=need_weights, **given)
        mixed = ours(*(sequence(torch.bfloat16),) * 3, need_weights=need_weights, **given)[0]
    assert out.dtype is theirs.dtype is mixed.dtype is torch.bfloat16
    assert weights is None or weights.dtype is their_weights.dtype
    floor = 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (out.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor
    out.float().sum().backward()
    assert ours.in_proj_weight.grad.dtype is torch.float32


def test_autocast_leaves_float64_alone():
    stock, ours = build_pair()
    x = sequence()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = stock(x, x, x), ours(x, x, x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_checkpointing_recomputes_the_same_dropout(need_weights):
    _, ours = build_pair(dropout=0.5)
    gradients = []
    for run in (
        lambda x: ours(x, x, x, need_weights=need_weights),
        lambda x: checkpoint(ours, x, x, x, None, need_weights, use_reentrant=False),
    ):
        x = sequence().requires_grad_()
        torch.manual_seed(3)
        out, weights = run(x)
        loss = out.square().sum() + (weights.square().sum() if need_weights else 0.0)
        gradients.append(torch.autograd.grad(loss, [x, *ours.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_vmap_of_the_gradient_gives_one_gradient_a_member(need_weights, causal):
    _, ours = build_pair()
    parameters = dict(ours.named_parameters())

    def loss(parameters, member):
        out, weights = torch.func.functional_call(
            ours, parameters, (member, member, member), {"need_weights": need_weights, "is_causal": causal}
        )
        return out.square().sum() + (weights.square().sum() if need_weights else 0.0)

    by_member = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, sequence())
    for index, member in enumerate(sequence()):
        expected = dict(zip(parameters, torch.autograd.grad(loss(parameters, member), parameters.values()), strict=True))
        torch.testing.assert_close({name: gradient[index] for name, gradient in by_member.items()}, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_vmap_over_batches(need_weights):
    _, ours = build_pair()
    batches = torch.stack([sequence(seed=seed) for seed in range(4)])

    def call(x):
        out, weights = ours(x, x, x, key_padding_mask=padding(), need_weights=need_weights)
        return (out, weights) if need_weights else out

    expected = [call(x) for x in batches]
    expected = tuple(torch.stack(parts) for parts in zip(*expected, strict=True)) if need_weights else torch.stack(expected)
    torch.testing.assert_close(torch.func.vmap(call)(batches), expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_second_derivatives_against_differences(need_weights):
    torch.manual_seed(0)
    ours = MultiHeadAttention(4, 2, dtype=torch.float64)
    x = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.tensor([[False, False, True]])

    def call(x):
        out, weights = ours(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        return (out, weights) if need_weights else out

    assert torch.autograd.gradcheck(call, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x,), fast_mode=True)


def test_hooks_see_torchs_arguments():
    """By position and by keyword, in front and behind."""
    seen = []
    for module in build_pair():
        module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        module.register_forward_hook(lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True)
        module(*(sequence(),) * 3, attn_mask=later(), key_padding_mask=padding(), average_attn_weights=False)
    front, behind, *ours = seen
    torch.testing.assert_close(ours, [front, behind])
    assert [list(kwargs) for _, kwargs, *_ in ours] == [list(front[1])] * 2


def test_parametrisation_of_both_projections():
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    stock, ours = build_pair()
    x = sequence()
    for module in (stock, ours):
        parametrize.register_parametrization(module, "in_proj_weight", Doubled())
        parametrize.register_parametrization(module.out_proj, "weight", Doubled())
    torch.testing.assert_close(ours(x, x, x), stock(x, x, x))
    parametrize.remove_parametrizations(ours, "in_proj_weight")
    assert type(ours) is MultiHeadAttention


def test_pruning_of_the_output_projection_trains():
    """prune reapplies its mask in a pre-hook, which must run at every call."""
    _, ours = build_pair()
    prune.l1_unstructured(ours.out_proj, "weight", amount=0.5)
    for _ in range(2):
        ours(*(sequence(),) * 3)[0].sum().backward()
    assert (ours.out_proj.weight_orig.grad[ours.out_proj.weight_mask == 0] == 0).all()
    assert (ours.out_proj.weight_orig.grad != 0).any()


def test_a_stock_module_becomes_ours_by_its_class_and_back():
    """No constructor of ours runs: the class alone must be enough."""
    stock, _ = build_pair(dropout=0.1)
    x = sequence()
    expected = stock.eval()(x, x, x)
    stock.__class__ = MultiHeadAttention
    torch.testing.assert_close(stock(x, x, x), expected)
    torch.testing.assert_close(stock(x, x, x, is_causal=True)[1].triu(1), torch.zeros(BATCH, SEQLEN, SEQLEN, dtype=torch.float64))
    stock.__class__ = nn.MultiheadAttention
    torch.testing.assert_close(stock(x, x, x), expected, rtol=0, atol=0)


def test_the_modules_survive_being_put_in_torchs_place(monkeypatch):
    """With nn.MultiheadAttention = ours, a base class looked up at the call would be ours: endless recursion."""
    monkeypatch.setattr(nn, "MultiheadAttention", MultiHeadAttention)
    monkeypatch.setattr(nn.modules.activation, "MultiheadAttention", MultiHeadAttention)
    monkeypatch.setattr(nn.modules.transformer, "MultiheadAttention", MultiHeadAttention)
    monkeypatch.setattr(nn, "TransformerEncoderLayer", TransformerLayer)
    monkeypatch.setattr(nn.modules.transformer, "TransformerEncoderLayer", TransformerLayer)
    layer = nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True)
    assert type(layer.self_attn) is MultiHeadAttention
    layer(sequence(torch.float32), src_mask=later())
    with pytest.raises(AssertionError, match="embedding dimension"):
        nn.MultiheadAttention(EMBED_DIM, HEADS)(*(torch.zeros(2, 2, 9),) * 3)


@pytest.mark.parametrize("kind", ["attention", "layer"])
def test_deviation_torch_fx_enters_our_modules(kind):
    """It keeps the classes of torch.nn whole, by the name of their module; a tracer that is told so keeps ours."""
    stock, ours = {
        "attention": (nn.MultiheadAttention, MultiHeadAttention),
        "layer": (nn.TransformerEncoderLayer, TransformerLayer),
    }[kind]

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, stock) or super().is_leaf_module(module, name)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
            self.part = stock(EMBED_DIM, HEADS, **options)

        def forward(self, x):
            return self.part(x, x, x)[0] if kind == "attention" else self.part(x)

    model = Model()
    expected = model(sequence())
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(sequence()), expected)
    replace_modules(model)
    assert type(model.part) is ours
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    torch.testing.assert_close(torch.fx.GraphModule(model, Whole().trace(model))(sequence()), expected)
    restore_modules(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(sequence()), expected)
