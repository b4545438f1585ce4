"""What MultiHeadAttention does beyond torch's class, against the definition in float64: results, weights and every gradient."""

import copy

import pytest
import torch

from fused_attention import MultiHeadAttention

from .attention_extras import (
    BATCH,
    EMBED_DIM,
    EXTRAS,
    KEYS,
    QUERIES,
    build,
    definition,
    extras,
    hidden_keys,
    masks,
    sequences,
)


@extras
@masks
@pytest.mark.parametrize(("cross", "batch_first"), [(False, True), (True, False)], ids=["self, batch first", "cross, sequence first"])
def test_results_and_gradients_are_those_of_the_definition(options, mask, cross, batch_first):
    module = build(options, batch_first)
    inputs = sequences(module, cross)
    given = mask(QUERIES, KEYS if cross else QUERIES)
    leaves = {id(x): x.detach().requires_grad_() for x in inputs}
    operands = [leaves[id(x)] for x in inputs]  # the same tensor again where the module may see so
    out, weights = module(*operands, **given, average_attn_weights=False)
    state = dict(module.named_parameters())
    first = [x if batch_first else x.transpose(0, 1) for x in operands]
    expected, expected_weights = definition(options, state, *first, **given)
    expected = expected if batch_first else expected.transpose(0, 1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(module(*operands, **given, need_weights=False)[0], out)
    variables = [*leaves.values(), *module.parameters()]
    cotangents = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in (out, weights)]
    got = torch.autograd.grad((out, weights), variables, cotangents)
    torch.testing.assert_close(got, torch.autograd.grad((expected, expected_weights), variables, cotangents))


def test_alibi_of_twelve_heads_is_a_bias_of_the_published_slopes():
    """Eight heads have the slopes of eight, four more every other one of sixteen: no power of two, and exact in float64."""
    slopes = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]
    torch.manual_seed(0)
    alibi = MultiHeadAttention(EMBED_DIM, 12, batch_first=True, dtype=torch.float64, alibi=True)
    plain = MultiHeadAttention(EMBED_DIM, 12, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(alibi.state_dict())
    x = sequences(alibi, cross=False)[0]
    distance = (torch.arange(QUERIES) - torch.arange(QUERIES)[:, None]).abs()
    bias = -torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance
    expected, _ = plain(x, x, x, attn_mask=bias.repeat(BATCH, 1, 1))
    torch.testing.assert_close(alibi(x, x, x)[0], expected, rtol=1e-12, atol=1e-12)


@extras
def test_unbatched_input_is_a_batch_of_one(options):
    module = build(options, batch_first=False)
    operands = sequences(module, cross=True, batched=False)
    out, weights = module(*operands, key_padding_mask=hidden_keys(KEYS)[1], is_causal=True)
    expected, expected_weights = definition(
        options, dict(module.named_parameters()), *(x[None] for x in operands), key_padding_mask=hidden_keys(KEYS)[1:], is_causal=True
    )
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(weights, expected_weights[0].mean(0))


@pytest.mark.parametrize("name", ["grouped heads of unlike inputs", "beside added keys", "all"])
def test_compiled_in_one_graph_it_is_the_same(name):
    module = build(EXTRAS[name])
    operands = sequences(module, cross=False)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    call = {"key_padding_mask": hidden_keys(QUERIES), "is_causal": True}
    results = [function(*operands, **call) for function in (module, compiled)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(out.square().sum(), module.parameters()) for out, _ in results]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_dropout_drops_weights_of_every_extra():
    module = build({**EXTRAS["all"], "dropout": 0.5})
    operands = sequences(module, cross=False)
    torch.manual_seed(0)
    out, weights = module(*operands, average_attn_weights=False)
    torch.manual_seed(0)
    again, _ = module(*operands, need_weights=False)
    torch.testing.assert_close(again, out)
    _, kept = module.eval()(*operands, average_attn_weights=False)
    dropped = (weights == 0) & (kept != 0)
    assert 0.2 < dropped.sum() / (kept != 0).sum() < 0.8
    torch.testing.assert_close(weights[~dropped], 2 * kept[~dropped])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_and_autocast(dtype):
    module, operands = build(EXTRAS["all"]), sequences(build(EXTRAS["all"]), cross=True)
    truth, _ = definition(EXTRAS["all"], dict(module.named_parameters()), *operands)
    half = copy.deepcopy(module).to(dtype)
    out = half(*(x.to(dtype) for x in operands))[0]
    assert out.dtype is dtype
    # Three roundings of a product on the way (projection, scores' operands, output), each of values no larger than the largest.
    error = 8 * torch.finfo(dtype).eps * truth.abs().max()
    assert (out.double() - truth).abs().max() < error
    if dtype is torch.float32:
        return  # autocast has nothing to cast to it
    single = copy.deepcopy(module).float()
    with torch.autocast("cpu", dtype=dtype):
        out = single(*(x.float() for x in operands))[0]
    assert out.dtype is dtype
    assert (out.double() - truth).abs().max() < error


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_kept_in_float32_in_a_module_of_bfloat16(kind):
    module = build({"qk_norm": kind, "num_kv_heads": 2}, dtype=torch.bfloat16)
    x = sequences(module, cross=False)[0].bfloat16()
    for norm in (module.q_norm, module.k_norm):
        norm.float()
    exact = copy.deepcopy(module).double()
    out = module(x, x, x)[0]
    assert out.dtype is torch.bfloat16
    truth = exact(x.double(), x.double(), x.double())[0]
    assert (out.double() - truth).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


def test_autocast_leaves_float64_alone():
    module, operands = build(EXTRAS["all"]), sequences(build(EXTRAS["all"]), cross=True)
    expected = module(*operands)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(*operands), expected, rtol=0, atol=0)
        with pytest.raises(TypeError, match=r"attn_mask is torch\.float32 .*expected .* masks of bool or that dtype"):
            module(*operands, attn_mask=torch.zeros(QUERIES, KEYS))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_empty_sequences_and_batches(name):
    module = build(EXTRAS["all"])
    shapes = {"query": (2, 0, 3), "key": (2, 3, 0), "value": (0, 3, 3)}[name]
    batch, seqlen_q, seqlen_k = shapes
    query, key = (torch.randn(batch, seqlen, EMBED_DIM, dtype=torch.float64) for seqlen in (seqlen_q, seqlen_k))
    out, weights = module(query, key, key)
    assert out.shape == query.shape
    assert weights.shape == (batch, seqlen_q, seqlen_k)
    if seqlen_k == 0:
        torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))
