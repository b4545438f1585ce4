"""Relations that need no oracle: two calls that must return the same numbers, to the last bit where both run the same sums.

A BLAS may order its sums by the shape of a product; where two calls differ in shape, the backends built on it answer to tier 1 instead.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from fused_attention import attention, attention_with_lse, backends, blockwise
from fused_attention.testing import Case, Inputs, Truth, tier1
from fused_attention.testing.inputs import lay_out

RUNNABLE = [name for name, reason in backends().items() if reason is None]
BITWISE = ("cpu",)  # sums in an order of their own, whatever the shape

CROSS = Case("cross", batch=3, heads=6, kv_heads=2, seqlen_q=21, seqlen_k=37, head_dim=16, head_dim_v=11)
CAUSAL = Case("causal", batch=3, heads=6, kv_heads=2, seqlen_q=25, seqlen_k=25, head_dim=16, causal=True)


@pytest.fixture(params=RUNNABLE, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    return request.param


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs by {(tensor - second[name]).abs().max()}"


def agree(backend: str, first: dict[str, Tensor], second: dict[str, Tensor], truth: Truth) -> None:
    """Bitwise, or where the shapes of BLAS products differ within the bounds of both."""
    if backend in BITWISE:
        equal(first, second)
    bounds = tier1(truth)
    for name, tensor in first.items():
        error = torch.where(tensor == second[name], 0.0, (tensor - second[name]).abs())
        assert (error <= 2.02 * bounds[name]).all(), f"{name} differs by {(error / bounds[name]).max():.3g} bounds"


def mapped(output: dict[str, Tensor], function) -> dict[str, Tensor]:
    return {name: function(tensor) for name, tensor in output.items()}


def usable(inputs: Inputs, backend: str) -> Inputs:
    reason = inputs.explain().reasons[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return inputs


@cache
def made(case: Case) -> tuple[Inputs, Truth]:
    inputs = case.make()
    return inputs, inputs.truth()


@cache
def output_of(case: Case, backend: str) -> dict[str, Tensor]:
    """What the changed calls of several tests are held against."""
    return made(case)[0].run(backend)


def forward(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    return inputs.run(backend, backward=False)


@pytest.mark.parametrize("case", [CROSS, CAUSAL], ids=lambda case: case.name)
def test_e1_permuted_batch_members(case, backend):
    inputs, order = case.make(), [2, 0, 1]
    tensors = {name: getattr(inputs, name)[order] for name in ("q", "k", "v", "dout", "dlse")}
    permuted = inputs.changed(**tensors)
    agree(backend, mapped(output_of(case, backend), lambda x: x[order]), permuted.run(backend), permuted.truth())


def test_e2_permuted_heads(backend):
    inputs, groups, heads = CROSS.make(), [1, 0], [4, 3, 5, 1, 2, 0]
    tensors = {name: getattr(inputs, name)[:, heads] for name in ("q", "dout", "dlse")}
    tensors |= {name: getattr(inputs, name)[:, groups] for name in ("k", "v")}
    output, permuted = output_of(CROSS, backend), inputs.changed(**tensors).run(backend)
    for name in ("out", "lse", "dq"):
        agree(backend, {name: output[name][:, heads]}, {name: permuted[name]}, inputs.changed(**tensors).truth())
    bounds = tier1(inputs.truth())  # dk and dv add up the heads of a group in another order
    for name in ("dk", "dv"):
        assert ((output[name][:, groups] - permuted[name]).abs() <= 2.02 * bounds[name][:, groups]).all()


def test_e3_equal_rows_give_equal_rows(backend):
    """Any tile, any lane and any remainder treats a row alike."""
    inputs = CROSS.make()
    cloned = inputs.changed(q=inputs.q[:, :, :1].expand_as(inputs.q).contiguous())
    output = forward(cloned, backend)
    first = {"out": output["out"][:, :, :1].expand_as(output["out"]), "lse": output["lse"][:, :, :1].expand_as(output["lse"])}
    agree(backend, first, output, cloned.truth())


@pytest.mark.parametrize("last", [0, 15, 16, 22])
def test_e4_no_row_sees_the_future(last, backend):
    inputs = CAUSAL.make()
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, last + 1 :], v[:, :, last + 1 :] = 1e3, -1e3
    output, changed = forward(inputs, backend), forward(inputs.changed(k=k, v=v), backend)
    equal(mapped(output, lambda x: x[:, :, : last + 1]), mapped(changed, lambda x: x[:, :, : last + 1]))
    assert not torch.equal(output["out"][:, :, last + 1 :], changed["out"][:, :, last + 1 :])


def test_e5_batch_neighbours_do_not_matter(backend):
    inputs = CAUSAL.make()
    tensors = {name: getattr(inputs, name).clone() for name in ("q", "k", "v")}
    for tensor in tensors.values():
        tensor[1:] = 7.0
    equal(mapped(output_of(CAUSAL, backend), lambda x: x[:1]), mapped(inputs.changed(**tensors).run(backend), lambda x: x[:1]))


@pytest.mark.parametrize("filler", [math.nan, math.inf, 1e30, 0.0])
def test_e6_unused_keys_may_hold_anything(filler, backend):
    lengths = torch.tensor([[0, 20], [7, 37], [0, 0]])
    inputs = CROSS.make().changed(options={"kv_lengths": lengths})
    unused = torch.ones(3, 37, dtype=torch.bool)
    for member, (start, end) in enumerate(lengths.tolist()):
        unused[member, start:end] = False
    hidden = unused[:, None, :, None]
    filled = inputs.changed(k=inputs.k.masked_fill(hidden, filler), v=inputs.v.masked_fill(hidden, filler))
    output = filled.run(backend)
    equal(inputs.run(backend), output)
    for name in ("dk", "dv"):
        assert not output[name].masked_select(hidden.expand_as(output[name])).any(), f"{name} of an unused key is not 0"


def test_e6_packed_rows_past_the_members_may_hold_anything(backend):
    inputs = Case("packed", lengths_q=(5, 0, 11), lengths_k=(9, 2, 7), unused=3, causal=True).make()
    usable(inputs, backend)
    tensors = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "dout")}
    for tensor in tensors.values():
        tensor[-3:] = math.nan
    output = inputs.changed(**tensors).run(backend)
    equal(inputs.run(backend), output)
    for name in ("out", "dq", "dk", "dv"):
        assert not output[name][-3:].any(), f"{name} past the last member is not 0"


def test_e7_grouped_heads_are_repeated_heads(backend):
    inputs = CROSS.make()
    repeated = inputs.changed(k=inputs.k.repeat_interleave(3, 1), v=inputs.v.repeat_interleave(3, 1))
    agree(backend, forward(inputs, backend), forward(repeated, backend), inputs.truth())


@pytest.mark.parametrize("case", [CROSS, CAUSAL], ids=lambda case: case.name)
def test_e8_queries_in_chunks(case, backend):
    """In chunks of 11 all of them, the last too, are more than what a kernel for few queries would take."""
    inputs = case.make()
    whole, parts = forward(inputs, backend), []
    for start in range(0, case.seqlen_q, 11):
        rows = slice(start, start + 11)
        chunk = inputs.changed(q=inputs.q[:, :, rows], options={"offset": case.seqlen_k - case.seqlen_q + start})
        parts.append(forward(chunk, backend))
    joined = {name: torch.cat([part[name] for part in parts], dim=2) for name in whole}
    agree(backend, whole, joined, inputs.truth())


@pytest.mark.parametrize("causal", [False, True])
def test_e9_packed_padded_and_single_sequences(causal, backend):
    """Packed members, the same sequences padded to one length, and each alone are one computation."""
    lengths = (5, 0, 17, 33)
    packed = Case("packed", lengths_q=lengths, heads=4, kv_heads=2, head_dim=16, causal=causal).make()
    output, bounds = forward(usable(packed, backend), backend), tier1(packed.truth())
    longest, starts = max(lengths), packed.options["cu_seqlens_q"].tolist()
    padded = [torch.zeros(len(lengths), x.shape[1], longest, 16) for x in (packed.q, packed.k, packed.v)]
    for member, length in enumerate(lengths):
        rows = slice(starts[member], starts[member + 1])
        for whole, part in zip(padded, (packed.q, packed.k, packed.v), strict=True):
            whole[member, :, :length] = part[rows].transpose(0, 1)
    options = {"causal": causal, "kv_lengths": torch.tensor(lengths), "offset": 0}
    together = attention_with_lse(*padded, **options, backend=backend)
    for member, length in enumerate(lengths):
        rows = slice(starts[member], starts[member + 1])
        single = attention_with_lse(*(x[member : member + 1, :, :length] for x in padded), causal=causal, backend=backend)
        for other in (single.out[0], together.out[member, :, :length]):
            assert ((other.transpose(0, 1) - output["out"][rows]).abs() <= 2.02 * bounds["out"][rows]).all()
        for other in (single.lse[0], together.lse[member, :, :length]):
            assert ((other - output["lse"][:, rows]).abs() <= 2.02 * bounds["lse"][:, rows]).all()


def test_e10_values_scale_and_permute(backend):
    inputs = CROSS.make()
    output, order = forward(inputs, backend), torch.randperm(11)
    for power in (2.0**-9, -1.0, -(2.0**5)):
        scaled = forward(inputs.changed(v=inputs.v * power), backend)
        assert torch.equal(output["out"] * power, scaled["out"])
    permuted = forward(inputs.changed(v=inputs.v[..., order]), backend)
    agree(backend, {"out": output["out"][..., order]}, {"out": permuted["out"]}, inputs.changed(v=inputs.v[..., order]).truth())


@pytest.mark.parametrize("factor", [-1.0, 2.0**6, -(2.0**-7)])
def test_e10_queries_and_keys_share_a_power_of_two(factor, backend):
    inputs = CAUSAL.make()
    equal(forward(inputs, backend), forward(inputs.changed(q=inputs.q * factor, k=inputs.k / factor), backend))


@pytest.mark.parametrize("layout", ["transposed", "interleaved", "strided", "column", "offset"])
def test_e11_layouts(layout, backend):
    inputs = CAUSAL.make()
    moved = inputs.changed(**{name: lay_out(getattr(inputs, name), layout) for name in ("q", "k", "v", "dout")})
    agree(backend, output_of(CAUSAL, backend), moved.run(backend), made(CAUSAL)[1])


def test_e11_strides_of_dimensions_of_size_one(backend):
    """The stride of a dimension of size 1 means nothing (pytorch#116333)."""
    inputs = Case("one", batch=1, heads=1, seqlen_q=19, seqlen_k=23, head_dim=16, causal=True).make()

    def corrupted(tensor: Tensor) -> Tensor:
        return tensor.as_strided(tensor.shape, (3331333, 99990001, *tensor.stride()[2:]))

    moved = inputs.changed(**{name: corrupted(getattr(inputs, name)) for name in ("q", "k", "v", "dout")})
    equal(inputs.run(backend), moved.run(backend))


def test_e11_expanded_gradient_of_out(backend):
    """`out.sum().backward()` hands over a gradient of stride 0 (pytorch#138529)."""
    inputs = CROSS.make()
    q, k, v = (tensor.clone().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    attention(q, k, v, backend=backend).sum().backward()
    dense = inputs.changed(dout=torch.ones_like(inputs.dout), dlse=torch.zeros_like(inputs.dlse))
    agree(backend, {"dq": q.grad, "dk": k.grad, "dv": v.grad}, dense.run(backend), dense.truth())


@pytest.mark.parametrize("case", [CROSS, CAUSAL, Case("bias", bias="1h1k", alibi_slopes="h", dropout_p=0.2)], ids=lambda case: case.name)
def test_e12_the_same_call_twice(case, backend):
    inputs = usable(case.make(), backend)
    first = inputs.run(backend)
    for _ in range(1 if backend == "triton" else 5):  # the interpreter is slow, and runs one program after the other
        equal(first, inputs.run(backend))


def test_e13_threads_do_not_matter(backend):
    inputs = CAUSAL.make()
    single = output_of(CAUSAL, backend)
    torch.set_num_threads(2)
    try:
        agree(backend, single, inputs.run(backend), inputs.truth())
    finally:
        torch.set_num_threads(1)


def test_e14_captured_graphs_compute_the_same(backend):
    inputs = CAUSAL.make()
    if backend == "reference":
        pytest.skip("the reference is plain PyTorch: its graph may be rewritten")
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    equal({"out": attention(inputs.q, inputs.k, inputs.v, causal=True, backend=backend)},
          {"out": compiled(inputs.q, inputs.k, inputs.v, causal=True, backend=backend)})  # fmt: skip


def test_e15_causal_is_a_window(backend):
    inputs = CAUSAL.make().changed(options={"causal": None})
    causal = output_of(CAUSAL, backend)
    for window in ((None, 0), (40, 0), (2**40, 0)):
        equal(causal, inputs.changed(options={"window": window}).run(backend))
    equal(causal, inputs.changed(options={"causal": True, "window": (40, None)}).run(backend))


def test_e16_zeros_appended_to_head_dim(backend):
    inputs = CAUSAL.make().changed(options={"scale": 0.25})

    def longer(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 5))

    output = forward(inputs.changed(q=longer(inputs.q), k=longer(inputs.k), v=longer(inputs.v)), backend)
    assert not output["out"][..., 16:].any()
    agree(backend, forward(inputs, backend), output | {"out": output["out"][..., :16]}, inputs.truth())


def test_e17_inputs_are_not_written(backend):
    inputs = Case("inputs", bias="b11k", mask="qk", alibi_slopes="h", sinks=True, kv_lengths=(9, 17), dropout_p=0.3).make()
    usable(inputs, backend)
    given = {name: getattr(inputs, name) for name in ("q", "k", "v", "dout", "dlse")}
    given |= {name: value for name, value in inputs.options.items() if isinstance(value, Tensor)}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in given.items()}
    inputs.run(backend)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor._version == before[name][1], name
