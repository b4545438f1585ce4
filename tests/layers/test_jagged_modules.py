"""The modules on jagged nested tensors, which torch's refuse: each batch member as torch's module computes it alone."""

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, Transformer, TransformerLayer

EMBED_DIM, HEADS = 8, 2
LENGTHS, KEY_LENGTHS = (5, 1, 3), (2, 4, 6)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]

CONSTRUCTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 5, "vdim": 7},
    "added bias": {"add_bias_kv": True},
    "added zero": {"add_zero_attn": True},
}


def build_pair(options):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64, **options)
    ours = MultiHeadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def members(lengths, features, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(length, features, generator=draw, dtype=torch.float64, requires_grad=True) for length in lengths]


def jagged(*sequences):
    """Jagged tensors of one set of offsets; gradients reach the members."""
    offsets = torch.tensor([0, *(len(member) for member in sequences[0])]).cumsum(0)
    return [torch.nested.nested_tensor_from_jagged(torch.cat(each), offsets) for each in sequences]


def later(seqlen_q, seqlen_k):
    return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weighing", [None, "averaged", "by head"])
@pytest.mark.parametrize("training", [True, False])
def test_deviation_jagged_batches_are_attended(options, causal, weighing, training):
    stock, ours = build_pair(options)
    queries, keys, values = (
        members(lengths, features, seed)
        for seed, (lengths, features) in enumerate(((LENGTHS, EMBED_DIM), (KEY_LENGTHS, ours.kdim), (KEY_LENGTHS, ours.vdim)))
    )
    call = {"need_weights": weighing is not None, "average_attn_weights": weighing == "averaged"}
    (query,), (key, value) = jagged(queries), jagged(keys, values)
    out, weights = ours.train(training)(query, key, value, is_causal=causal, **call)
    assert out.is_nested
    assert out.shape == query.shape  # of the same ragged dimension, so that they can be added
    assert (weights is None) == (weighing is None)
    expected, losses = [], [out.values().square().sum()]
    for index, (member, mine) in enumerate(zip(zip(queries, keys, values, strict=True), out.unbind(), strict=True)):
        mask = later(len(member[0]), len(member[1])) if causal else None
        theirs, their_weights = stock.train()(*member, attn_mask=mask, **call)
        torch.testing.assert_close(mine, theirs)
        expected.append(theirs.square().sum())
        if weights is not None:
            added = their_weights.shape[-1] - len(member[1])
            inside = weights[index][..., : len(member[0]), :]
            inside = torch.cat([inside[..., : len(member[1])], inside[..., inside.shape[-1] - added :]], -1)
            torch.testing.assert_close(inside, their_weights)
            torch.testing.assert_close(weights[index].sum(), their_weights.sum())  # and zeros elsewhere
    leaves = [*queries, *keys, *values]
    theirs = torch.autograd.grad(sum(expected), [*leaves, *stock.parameters()])
    torch.testing.assert_close(torch.autograd.grad(sum(losses), [*leaves, *ours.parameters()]), theirs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_deviation_jagged_batches_pass_through_every_layer_and_stack(norm_first, causal):
    torch.manual_seed(0)
    stock = nn.Transformer(EMBED_DIM, HEADS, 1, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    ours = Transformer(EMBED_DIM, HEADS, 1, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    ours.load_state_dict(stock.state_dict())
    sources, targets = members(KEY_LENGTHS, EMBED_DIM, 1), members(LENGTHS, EMBED_DIM, 2)
    (src,), (tgt,) = jagged(sources), jagged(targets)
    out = ours(src, tgt, tgt_is_causal=causal)
    expected = [
        stock(source[None], target[None], tgt_mask=later(len(target), len(target)) if causal else None)[0]
        for source, target in zip(sources, targets, strict=True)
    ]
    torch.testing.assert_close(list(out.unbind()), expected)
    theirs = torch.autograd.grad(sum(member.square().sum() for member in expected), [*sources, *targets, *stock.parameters()])
    torch.testing.assert_close(torch.autograd.grad(out.values().square().sum(), [*sources, *targets, *ours.parameters()]), theirs)


def test_dropout_reaches_jagged_batches_in_training_alone():
    _, ours = build_pair({"dropout": 0.5})
    (x,) = jagged(members(LENGTHS, EMBED_DIM, 1))
    first, second = (ours(x, x, x, need_weights=False)[0].values() for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    first, second = (ours(x, x, x, need_weights=False)[0].values() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("need_weights", [True, False])
def test_members_without_rows(need_weights):
    stock, ours = build_pair({})
    queries, keys = members((0, 3, 2), EMBED_DIM, 1), members((4, 0, 2), EMBED_DIM, 2)
    (query,), (key,) = jagged(queries), jagged(keys)
    out = ours(query, key, key, need_weights=need_weights)[0].unbind()
    assert out[0].shape == (0, EMBED_DIM)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(3, -1))  # no keys
    torch.testing.assert_close(out[2], stock(queries[2], keys[2], keys[2])[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_batch_without_members(need_weights):
    _, ours = build_pair({})
    x = torch.nested.nested_tensor_from_jagged(torch.zeros(0, EMBED_DIM, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
    out, weights = ours(x, x, x, need_weights=need_weights)
    assert out.values().shape == (0, EMBED_DIM)
    assert weights is None or weights.shape == (0, 0, 0)


def test_jagged_layers_compile_without_a_graph_break():
    torch.manual_seed(0)
    layer = TransformerLayer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True)
    (x,) = jagged(members(LENGTHS, EMBED_DIM, 1))
    x = x.float().detach()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, is_causal=True).values(), layer(x, is_causal=True).values())


@pytest.mark.parametrize(
    "wrong", ["mask", "batch second", "mixed", "features", "unlike keys and values", "batch", "holes", "dtype", "transposed"]
)
def test_other_jagged_calls_are_torchs_to_refuse(wrong):
    stock, ours = build_pair({})
    x, y = jagged(members(LENGTHS, EMBED_DIM, 1), members(LENGTHS, EMBED_DIM, 2))
    (other,) = jagged(members(KEY_LENGTHS, EMBED_DIM, 3))
    tensors, call = (x, y, y), {}
    if wrong == "mask":
        call["key_padding_mask"] = torch.zeros(3, 5, dtype=torch.bool)
    elif wrong == "batch second":
        stock.batch_first = ours.batch_first = False
    elif wrong == "mixed":
        tensors = (torch.zeros(3, 5, EMBED_DIM, dtype=torch.float64), y, y)
    elif wrong == "features":
        tensors = jagged(*(members(LENGTHS, EMBED_DIM + 1, seed) for seed in range(3)))
    elif wrong == "unlike keys and values":
        tensors = (x, y, other)
    elif wrong == "holes":
        tensors = (torch.nested.nested_tensor_from_jagged(x.values(), x.offsets(), torch.tensor([4, 1, 2])),) * 3
    elif wrong == "dtype":
        tensors = (x.float(),) * 3
    elif wrong == "transposed":
        tensors = (x.transpose(1, 2),) * 3
    else:
        tensors = (x, *jagged(*(members((1, 2), EMBED_DIM, seed) for seed in range(2))))
    outcomes = []
    for module in (stock, ours):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            module(*tensors, **call)
        outcomes.append((type(caught.value), str(caught.value)))
    assert outcomes[0] == outcomes[1]


def test_torch_refuses_jagged_batches():
    """The behaviour these tests depart from; once torch takes them, the deviation is none."""
    stock, _ = build_pair({})
    (x,) = jagged(members(LENGTHS, EMBED_DIM, 1))
    with pytest.raises(AssertionError, match="does not support NestedTensor"):
        stock(x, x, x)
