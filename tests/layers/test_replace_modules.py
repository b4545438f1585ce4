"""replace_modules and restore_modules: what changes class and what is passed over, results, hooks, optimizers, compilers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fused_attention
from fused_attention import (
    MultiHeadAttention,
    Report,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerLayer,
    replace_modules,
    restore_modules,
)

D_MODEL, HEADS, BATCH, SEQLEN = 8, 2, 3, 5

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


def transformer(seed=0):
    torch.manual_seed(seed)
    return nn.Transformer(D_MODEL, HEADS, 2, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)


class Block(nn.Module):
    """A pre-norm block as vision transformers write it, around nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(D_MODEL, dtype=torch.float64) for _ in range(2))
        self.self_attention = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True, dtype=torch.float64)
        self.mlp = nn.Sequential(
            nn.Linear(D_MODEL, 16, dtype=torch.float64), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, D_MODEL, dtype=torch.float64)
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, blocks, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, D_MODEL, 4, 4, dtype=torch.float64)
        self.class_token = nn.Parameter(torch.randn(1, 1, D_MODEL, dtype=torch.float64))
        self.positions = nn.Parameter(torch.randn(1, 10, D_MODEL, dtype=torch.float64))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(D_MODEL, 4, dtype=torch.float64)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.blocks(x)[:, 0])


class Overriding(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) * 2


def sequences(*lengths):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, length, D_MODEL, generator=draw, dtype=torch.float64) for length in lengths]


def images():
    return [torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]


def padding():
    hidden = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


MODELS = {
    "nn.Transformer": (transformer, lambda: sequences(SEQLEN, 4)),
    "vision transformer": (VisionTransformer, images),
    "attention": (
        lambda: transformer().decoder.layers[0].multihead_attn,
        lambda: sequences(SEQLEN, 4, 4),
    ),
    "encoder": (lambda: transformer().encoder, lambda: sequences(SEQLEN)),
}
models = pytest.mark.parametrize(("build", "inputs"), MODELS.values(), ids=MODELS)


def classes(model):
    return [type(module) for module in model.modules()]


@models
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_a_swap_changes_no_result_and_a_restore_no_bit(build, inputs, mode):
    model = build().train(mode == "train")
    before, state = classes(model), copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.set_grad_enabled(mode != "no_grad"):
        expected = model(*inputs())
        report = replace_modules(model)
        torch.testing.assert_close(model(*inputs()), expected)
        assert report.replaced
        assert not report.skipped
        assert all(type(module).__module__.startswith("fused_attention") for module in map(model.get_submodule, report.replaced))
        assert restore_modules(model) == report
        torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=0)
    assert classes(model) == before
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@models
def test_gradients_after_a_swap(build, inputs):
    results = []
    for swap in (False, True):
        model = build()
        if swap:
            replace_modules(model)
        out = model(*inputs())
        out = out[0] if isinstance(out, tuple) else out
        results.append(torch.autograd.grad(out.square().sum(), model.parameters()))
    torch.testing.assert_close(results[1], results[0])


def test_every_class_has_its_counterpart():
    model = transformer()
    names = [name for name, module in model.named_modules() if type(module).__name__.startswith(("Multihead", "Transformer")) and name]
    assert replace_modules(model) == Report(tuple(names), {})
    assert type(model) is nn.Transformer  # it only calls its stacks
    assert type(model.encoder) is TransformerEncoder
    assert type(model.decoder) is TransformerDecoder
    assert type(model.encoder.layers[1]) is TransformerLayer
    assert type(model.decoder.layers[1]) is TransformerDecoderLayer
    assert type(model.decoder.layers[1].multihead_attn) is MultiHeadAttention


def test_swapping_twice_does_nothing_more():
    model = transformer()
    replace_modules(model)
    assert replace_modules(model) == Report((), {})
    restore_modules(model)
    assert restore_modules(model) == Report((), {})


def test_a_model_built_of_ours_becomes_torchs():
    torch.manual_seed(0)
    ours = Transformer(D_MODEL, HEADS, 2, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    restore_modules(ours)
    stock = transformer()
    assert classes(ours) == classes(stock)
    torch.testing.assert_close(ours(*sequences(SEQLEN, 4)), stock(*sequences(SEQLEN, 4)), rtol=0, atol=0)


def test_a_users_subclass_is_passed_over_with_the_reason():
    model = nn.ModuleDict(
        {
            "plain": nn.TransformerEncoderLayer(D_MODEL, HEADS, batch_first=True),
            "user": Overriding(D_MODEL, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64),
        }
    )
    x = sequences(SEQLEN)[0]
    expected = model["user"](x)
    report = replace_modules(model)
    assert report.replaced == ("plain", "plain.self_attn", "user.self_attn")
    assert list(report.skipped) == ["user"]
    assert "Overriding is a subclass of TransformerEncoderLayer" in report.skipped["user"]
    assert "derive it from TransformerLayer" in report.skipped["user"]
    assert type(model["user"]) is Overriding
    torch.testing.assert_close(model["user"](x), expected)


def test_a_subclass_of_ours_is_ours_and_cannot_become_torchs():
    class Mine(MultiHeadAttention):
        pass

    model = nn.Sequential(Mine(D_MODEL, HEADS))
    assert replace_modules(model) == Report((), {})
    assert list(restore_modules(model).skipped) == ["0"]
    assert type(model[0]) is Mine


def test_filter_fn_sees_module_and_name():
    model, seen = transformer(), []

    def decoder_only(module, name):
        seen.append((type(module), name))
        return name.startswith("decoder")

    report = replace_modules(model, filter_fn=decoder_only)
    assert set(report.replaced) == {name for _, name in seen if name.startswith("decoder")}
    assert report.skipped == {name: "filter_fn returned False" for _, name in seen if not name.startswith("decoder")}
    assert (nn.TransformerEncoder, "encoder") in seen
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.decoder) is TransformerDecoder


def test_a_forward_of_the_instances_own_is_passed_over():
    """As libraries do that wrap a module's forward: the class of such a module is not asked."""
    model = transformer()
    model.encoder.layers[0].forward = model.encoder.layers[0].forward
    report = replace_modules(model)
    assert "forward was replaced on the instance" in report.skipped["encoder.layers.0"]


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_a_parametrised_attention_is_passed_over_and_survives():
    model = transformer()
    parametrize.register_parametrization(model.encoder.layers[0].self_attn, "in_proj_weight", Doubled())
    expected = model(*sequences(SEQLEN, 4))
    report = replace_modules(model)
    assert "before parametrising" in report.skipped["encoder.layers.0.self_attn"]
    torch.testing.assert_close(model(*sequences(SEQLEN, 4)), expected)


def test_swap_then_parametrise():
    model, stock = transformer(), transformer()
    replace_modules(model)
    for each in (model, stock):
        parametrize.register_parametrization(each.encoder.layers[0].self_attn, "in_proj_weight", Doubled())
    torch.testing.assert_close(model(*sequences(SEQLEN, 4)), stock(*sequences(SEQLEN, 4)))
    assert "encoder.layers.0.self_attn" in restore_modules(model).skipped
    parametrize.remove_parametrizations(model.encoder.layers[0].self_attn, "in_proj_weight", leave_parametrized=False)
    assert type(model.encoder.layers[0].self_attn) is MultiHeadAttention
    assert restore_modules(model).replaced == ("encoder.layers.0.self_attn",)


def test_options_that_torch_lacks_cannot_be_restored():
    model = nn.ModuleList([MultiHeadAttention(D_MODEL, HEADS), MultiHeadAttention(D_MODEL, HEADS, num_kv_heads=1)])
    with pytest.raises(ValueError, match="1 is a MultiHeadAttention with num_kv_heads, which MultiheadAttention does not have"):
        restore_modules(model)
    assert classes(model)[1:3:2] == [MultiHeadAttention]  # nothing was changed


def test_hooks_stay_and_run():
    model, calls = transformer(), []
    for name in ("encoder", "encoder.layers.0", "encoder.layers.0.self_attn", "decoder.layers.1.multihead_attn"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model.encoder.layers[0].linear1.register_full_backward_hook(lambda *_: calls.append("backward"))
    replace_modules(model)
    model(*sequences(SEQLEN, 4)).sum().backward()
    assert calls == ["encoder.layers.0.self_attn", "encoder.layers.0", "encoder", "decoder.layers.1.multihead_attn", "backward"]


def test_an_optimizers_state_is_untouched_by_a_swap():
    losses = []
    for swap in (False, True):
        model = transformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = []
        for step in range(6):
            if swap and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                references = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
                replace_modules(model)
                assert [id(parameter) for parameter in model.parameters()] == references
                torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
            if swap and step == 4:
                restore_modules(model)
            loss = model(*sequences(SEQLEN, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_model_compiled_before_the_swap_calls_ours():
    model = transformer().encoder
    compiled = torch.compile(model, backend="eager")
    x = sequences(SEQLEN)[0]
    hidden = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    hidden[1] = True  # a member without keys: torch's attention answers NaN in evaluation
    model.eval()
    with torch.no_grad():
        assert compiled(x, src_key_padding_mask=hidden).isnan().any()
        replace_modules(model)
        assert torch.isfinite(compiled(x, src_key_padding_mask=hidden)).all()


def test_pickled_models_keep_their_classes():
    model = transformer()
    replace_modules(model)
    assert classes(pickle.loads(pickle.dumps(model))) == classes(model)


def test_the_report_reads_as_sentences():
    report = replace_modules(nn.MultiheadAttention(D_MODEL, HEADS), filter_fn=lambda module, name: False)
    assert str(report) == "replaced nothing\nskipped (the model itself): filter_fn returned False"
    assert str(replace_modules(nn.Sequential(nn.MultiheadAttention(D_MODEL, HEADS)))) == "replaced 1: 0"


@pytest.mark.parametrize("swap", [replace_modules, restore_modules])
def test_what_is_no_module_is_refused(swap):
    with pytest.raises(TypeError, match=r"model is a list, expected a torch\.nn\.Module"):
        swap([transformer()])


def test_the_swap_is_public():
    assert fused_attention.replace_modules is replace_modules
    assert fused_attention.restore_modules is restore_modules
