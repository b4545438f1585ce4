"""What must notice a fault that no single problem shows: each check asserts one promise of the Triton kernels."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from fused_attention import attention
from fused_attention.testing import Case, Inputs, Truth, check
from fused_attention.testing.oracle import philox

from .kernel_problems import DECODE, FORWARD, IN_FLOAT64, NAMED, ONE, TILES


def kernels(name: str) -> Any:
    return importlib.import_module(f"fused_attention.triton_kernels.{name}")


def run(inputs: Inputs, most_rows: int, backward: bool = True) -> dict[str, torch.Tensor]:
    take(most_rows)
    return inputs.run("triton", backward=backward)


def take(most_rows: int) -> None:
    """How many rows the kernel with split keys takes from now on."""
    TILES["decode"] = (most_rows, 16)


def check_problem(inputs: Inputs, truth: Truth, most_rows: int) -> None:
    """Forward and every gradient stay inside their bounds; forward alone first, for that is quick."""
    check(run(inputs, most_rows, backward=False), truth)
    check(run(inputs, most_rows), truth)


def check_float64() -> None:
    """Where nothing is rounded to speak of, every result is within 1e-12 of the truth."""
    for case in IN_FLOAT64:
        inputs = case.make()
        truth = inputs.truth()
        for name, got in run(inputs, FORWARD).items():
            expected = truth.values[name]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * float(expected[expected.isfinite()].abs().max()), msg=name)


def check_work() -> None:
    """As many products of tiles as tiles hold a visible pair: what a mask hides as a whole costs nothing, by position or by tensor."""
    block = {"heads": 1, "seqlen_q": 35, "seqlen_k": 150, "mask_block": 16}
    cases = (
        Case("window", **ONE, seqlen_q=70, seqlen_k=135, window=(20, 3), offset=37),
        Case("ranges", heads=1, seqlen_q=37, seqlen_k=101, kv_lengths=((33, 80), (0, 17)), causal=True, offset=60),
        Case("last-rows", **ONE, seqlen_q=17, seqlen_k=99, causal=True, offset=30),
        Case("first-keys", **ONE, seqlen_q=99, seqlen_k=17, window=(30, None), offset=0),
        Case("packed", heads=1, lengths_q=(5, 40), lengths_k=(50, 7), causal=True),
        Case("mask", **block, mask="b1qk"),
        Case("mask-heads", **(block | {"heads": 2}), batch=1, mask="1hqk", window=(60, 15), offset=90),
        Case("mask-keys", **block, mask="b11k", causal=True),
        Case("mask-queries", **block, mask="11q1", kv_lengths=(131, 0)),
        Case("mask-nothing", **ONE, mask="1111"),
        Case("mask-bias", **block, mask="11qk", bias="b1qk"),
        Case("mask-bias-heads", **(block | {"heads": 2}), batch=1, mask="1hqk", bias="1hqk"),
        Case("mask-bias-of-all", **(block | {"heads": 2}), mask="b1qk", bias="11qk"),
    )
    one_size = mock.patch.dict(TILES, {name: (16, 16) for name in TILES if name != "decode"})
    with one_size, counted_products() as calls:
        for case in cases:
            inputs = case.make()
            truth = inputs.truth(backward=False)
            visible = sum(visible_tiles(truth, member, head) for member in range(truth.call.batch) for head in range(case.heads))
            for backward, products in ((False, 2), (True, 2 + 4 + 3 + (2 if case.bias else 0))):
                calls.clear()
                run(inputs, FORWARD, backward)
                assert len(calls) == products * visible, f"{case.name} takes {len(calls)} products of tiles, not {products} * {visible}"


def check_split_work() -> None:
    """The same where keys are split over programs, and a tile holds the queries of all heads that share a key head."""
    few = {"batch": 3, "heads": 4, "kv_heads": 2, "seqlen_q": 3, "seqlen_k": 150, "mask_block": 32}
    with counted_products() as calls:
        for case in (Case("heads", **few, mask="bhqk"), Case("keys", **few, mask="b11k", kv_lengths=((40, 130), (0, 150), (70, 71)))):
            inputs = case.make()
            truth = inputs.truth(backward=False)
            groups = [(member, head) for member in range(3) for head in (0, 2)]
            run(inputs, DECODE, backward=False)
            visible = sum(tiles_of(truth.call.head(b, h).visible | truth.call.head(b, h + 1).visible) for b, h in groups)
            assert len(calls) == 2 * visible, f"{case.name} takes {len(calls)} products of tiles, not 2 * {visible}"
            calls.clear()


@contextmanager
def counted_products() -> Iterator[list[None]]:
    """One element for each product of tiles."""
    create_dot, calls = interpreter.InterpreterBuilder.create_dot, list[None]()

    def counted(*arguments: Any) -> Any:
        calls.append(None)
        return create_dot(*arguments)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", counted):
        yield calls


def visible_tiles(truth: Truth, member: int, head: int) -> int:
    return tiles_of(truth.call.head(member, head).visible)


def tiles_of(seen: torch.Tensor) -> int:
    """How many squares of 16 hold a visible pair."""
    rows, columns = (math.ceil(size / 16) * 16 for size in seen.shape)
    padded = torch.zeros(rows, columns, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    return int(padded.view(rows // 16, 16, columns // 16, 16).any(3).any(1).sum())


def check_hidden_values() -> None:
    """Numbers that are not finite, behind any mask, reach no result: not in a tile that other rows see, nor in the gradients."""
    hiding = {"batch": 2, "heads": 1, "seqlen_q": 18, "seqlen_k": 37, "softcap": 2.0, "sinks": True}
    hiders = ({"kv_lengths": ((5, 30), (3, 21))}, {"window": (7, 2), "offset": 11}, {"mask": "b11k"}, {"bias": "1h1k", "hiding_bias": True})
    for options in hiders:
        inputs = Case("hidden", **hiding, **options).make()
        truth = inputs.truth()
        hidden = torch.stack([~truth.call.head(member, 0).visible.any(0) for member in range(2)])[:, None, :, None]
        assert hidden.any(), "nothing is hidden from all rows"
        for number in (math.nan, math.inf):
            broken = inputs.changed(k=inputs.k.masked_fill(hidden, number), v=inputs.v.masked_fill(hidden, -number))
            check(run(broken, FORWARD), truth)
        check(run(broken, DECODE, backward=False), inputs.truth(backward=False))


def check_overflow() -> None:
    """A row all of whose scores overflow to -inf has seen nothing: zeros, also where no mask is applied."""
    inputs = Case("overflow", **ONE, seqlen_q=3, seqlen_k=20).make()
    q, k = inputs.q.clone(), inputs.k.abs().clamp(min=0.1)
    q[..., 1, :] = -torch.finfo(q.dtype).max
    for most_rows in (FORWARD, DECODE):
        result = run(inputs.changed(q=q, k=k), most_rows)
        assert result["lse"][0, 0, 1] == -math.inf
        for name in ("out", "dq"):
            assert (result[name][..., 1, :] == 0).all(), f"{name} of the row is {result[name][..., 1, :]}"
        for name in ("dk", "dv"):
            assert result[name].isfinite().all(), f"{name} is {result[name]}"


def check_visible_values() -> None:
    """A key or value that is not finite reaches all rows that see it, and no other."""
    for options in ({"causal": True}, {"window": (3, 1)}, {"mask": "11qk"}, {"bias": "11qk", "hiding_bias": True}):
        inputs = Case("seen", **ONE, seqlen_q=21, seqlen_k=21, head_dim=40, **options).make()
        truth = inputs.truth(backward=False)
        seeing = truth.call.head(0, 0).visible[:, 12]
        for name, column, number in (("k", 1, math.nan), ("v", 39, math.nan), ("v", 1, math.inf)):
            broken = getattr(inputs, name).clone()
            broken[0, 0, 12, column] = number
            for most_rows in (FORWARD, DECODE):
                out = run(inputs.changed(**{name: broken}), most_rows, backward=False)["out"]
                assert not out[0, 0, seeing, column].isfinite().any(), f"{number} in {name} does not reach every row"
                check(torch.where(seeing[:, None], truth.out.float(), out), truth)


def check_wide_integers() -> None:
    """Lengths and offsets are read as int64: no number beyond int32 is taken for its low bits."""
    wide = 2**32
    lengths, offsets, ranges = [wide + 3, 2 * wide], [wide + 1, -wide - 1], [[2 - wide, 9], [4, wide]]
    for name, numbers in (("kv_lengths", lengths), ("offset", offsets), ("kv_lengths", ranges)):
        inputs = Case("wide", heads=1, seqlen_q=5, seqlen_k=19, window=(6, 1)).make()
        inputs = inputs.changed(options={name: torch.tensor(numbers)})
        check(run(inputs, FORWARD), inputs.truth())


def check_memory() -> None:
    """No access outside a tensor, no element unwritten, and nothing right by grace of what lies in masked lanes."""
    from tests.triton.test_memory_safety import run_checked

    for name in ("everything", "packed-everything", "mask-bh1k", "bias-1hq1", "head-dim-65"):
        inputs = NAMED[name].make()
        for most_rows in (FORWARD, DECODE):
            take(most_rows)
            check(run_checked(inputs, backward=most_rows == FORWARD), inputs.truth(backward=most_rows == FORWARD))
    late = Case("late", heads=1, seqlen_q=2, seqlen_k=150, kv_lengths=((140, 150), (0, 150)), mask="b11k").make()  # splits past every key
    check(run_checked(late, backward=False), late.truth(backward=False))


def check_untrusted_integers() -> None:
    """No number in a tensor of lengths, offsets or members leads outside; members may overlap, and then write the same rows."""
    from tests.triton.test_memory_safety import faults, hostile

    random = np.random.default_rng(0)
    dense = Case("hostile", batch=15, heads=1, seqlen_q=3, seqlen_k=5, window=(3, 2)).make()
    dense = dense.changed(options={"kv_lengths": hostile(random, (2,), torch.int64, 5), "offset": hostile(random, (), torch.int64, 5)})
    packed = Case("hostile", heads=1, lengths_q=(9, 0, 20, 3) + (0,) * 10, lengths_k=(7, 19, 1, 6) + (0,) * 10).make()
    packed = packed.changed(options={name: hostile(random, (), torch.int64, 30) for name in ("cu_seqlens_q", "cu_seqlens_k")})
    take(FORWARD)
    found = faults(dense) + [fault for fault in faults(packed) if not fault.startswith("race:")]
    assert not found, found


def check_huge_strides() -> None:
    """A stride of 2**30 elements on each axis in turn: the last of three lies beyond int32."""
    from tests.triton.far_apart import far_apart

    near = Case("near", batch=3, heads=3, seqlen_q=3, seqlen_k=4, head_dim=3, bias="bhqk", mask="bhqk").make(dtype=torch.float16)
    packed = Case("near", heads=5, lengths_q=(3, 5), head_dim=5, causal=True).make(dtype=torch.float16)
    lengths = Case("near", batch=5, kv_lengths=((0, 9), (1, 8), (2, 7), (3, 6), (4, 5)), offset=(1, 2, 3, 4, 5), window=(3, 3)).make()
    for inputs, axes, names in ((near, 4, ("bias", "mask")), (packed, 3, ()), (lengths, 1, ("kv_lengths", "offset"))):
        for axis in range(axes):
            tensors = () if inputs is lengths else ("q", "k", "v", "dout")
            far = {name: far_apart(getattr(inputs, name), axis) for name in tensors}
            moved = inputs.changed(**far, options={name: far_apart(inputs.options[name], axis) for name in names})
            check(run(moved, FORWARD), inputs.truth())
            if inputs is not packed:
                check(run(moved, DECODE, backward=False), inputs.truth(backward=False))


def check_single_gradients() -> None:
    """One gradient alone equals the same among all."""
    inputs = Case("alone", heads=2, bias="1h1k", alibi_slopes="h", sinks=True).make()
    for bias in (inputs.options["bias"], inputs.options["bias"][..., :1]):
        given = inputs.changed(options={"bias": bias}, dlse=None)
        tensors, truth = {"q": given.q, "k": given.k, "v": given.v, **given.options}, given.truth()
        for name in ("q", "k", "v", "bias", "alibi_slopes", "sinks"):
            leaf = tensors[name].detach().requires_grad_()
            out = attention(**(tensors | {name: leaf}), backend="triton")
            check({f"d{name}": torch.autograd.grad(out, leaf, given.dout)[0]}, truth)


def check_strided_options() -> None:
    """Every second element of options, as a caller may cut them from a larger tensor."""
    inputs = Case("options", batch=3, heads=2, kv_lengths=((0, 9), (3, 17), (2, 11)), offset=(3, -1, 5), alibi_slopes="bh", sinks=True,
                  window=(7, 3), dropout_p=0.3).make()  # fmt: skip
    packed = NAMED["packed-cross"].make()
    for given, most_rows in ((inputs, FORWARD), (inputs, DECODE), (packed, FORWARD)):
        tensors = {name: option for name, option in given.options.items() if isinstance(option, torch.Tensor)}
        strided = {name: torch.stack([tensor, torch.ones_like(tensor)], -1)[..., 0] for name, tensor in tensors.items()}
        check(run(given.changed(options=strided), most_rows), given.truth())


def check_late_members() -> None:
    """Rows before the first member belong to nobody, just as those behind the last."""
    inputs = Case("late", heads=1, lengths_q=(25, 7)).make()
    late = inputs.changed(options={"cu_seqlens_q": torch.tensor([20, 27, 32])})
    check(run(late, FORWARD), late.truth())


def check_infinite_sink() -> None:
    """A sink of -inf is none: a row that sees no key besides sees nothing."""
    inputs = Case("sink", heads=2, sinks=True, kv_lengths=(0, 9)).make()
    inputs = inputs.changed(options={"sinks": torch.tensor([-math.inf, 0.3])})
    for most_rows in (FORWARD, DECODE):
        check(run(inputs, most_rows), inputs.truth())


def check_split_passes() -> None:
    """dk and dv in passes of their own, beside the gradient of a bias of keys."""
    inputs = Case("split-passes", heads=2, kv_heads=1, bias="1h1k", dropout_p=0.3).make()
    with mock.patch.object(kernels("tiles"), "splits_key_value", return_value=True):
        check(run(inputs, FORWARD), inputs.truth())


def check_threshold() -> None:
    """A word equal to floor(p 2**32) is kept."""
    inputs = Case("threshold", **ONE, seqlen_q=3, seqlen_k=5, dropout_p=0.5).make()
    seed, offset = inputs.options["dropout_seed"].tolist()
    zero = torch.zeros((), dtype=torch.int64)
    words = philox((zero, zero, zero, zero + offset % 2**32), (seed % 2**32, seed >> 32))
    exact = inputs.changed(options={"dropout_p": int(words[2]) / 2**32})
    assert exact.truth().call.dropout(0, 0, 3, 5)[0, 2] > 0
    check(run(exact, FORWARD), exact.truth())


def check_launch() -> None:
    """A kernel is submitted once, under the guard of its own device; nothing is launched for no programs."""
    launch, events = kernels("launch"), []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        events.append(str(device))
        yield
        events.append("exit")

    def submit(kernel: str, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        events.append((kernel, grid, arguments, options))

    submitted = ("kernel", (3,), (1, 2), {"BLOCK": 16, "num_warps": 8, "num_stages": 3})
    with (
        mock.patch.object(launch, "submit", submit),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "device", guard),
    ):
        for device, expected in (("cuda:1", ["cuda:1", submitted, "exit"]), ("cuda:0", [submitted]), ("cpu", [submitted])):
            events.clear()
            launch.launch("kernel", 3, torch.device(device), 1, 2, BLOCK=16, num_warps=8, num_stages=3)
            assert events == expected, f"on {device}: {events}"
        events.clear()
        launch.launch("kernel", 0, torch.device("cpu"))
        assert not events


def check_empty_launches() -> None:
    """Nothing is launched where there is no row."""
    with mock.patch.object(kernels("launch"), "submit", side_effect=AssertionError("a kernel is submitted")):
        for name in ("no-batch", "no-queries", "nothing"):
            for most_rows in (FORWARD, DECODE):
                run(NAMED[name].make(), most_rows, backward=False)


def check_tiles() -> None:
    """Every kernel gets the tile of its own pass."""
    launch, found = kernels("launch"), {}

    def submit(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found[kernel.__name__] = options["BLOCK_M"], options.get("BLOCK_N", 16)

    with mock.patch.object(launch, "submit", submit):
        inputs = NAMED["bias-1hqk"].make()
        run(inputs, FORWARD)
        run(inputs, DECODE, backward=False)
    passes = {"forward": "forward", "delta": "delta", "key_value": "dkv", "query": "dq", "bias": "dbias"}
    expected = {f"{kernel}_kernel": TILES[name] for kernel, name in passes.items()}
    assert found == expected | {"split_kernel": (16, 16)}, found  # its rows are as many as a power of two needs


CHECKS: tuple[Callable[[], None], ...] = (
    check_threshold,
    check_launch,
    check_tiles,
    check_empty_launches,
    check_late_members,
    check_infinite_sink,
    check_strided_options,
    check_wide_integers,
    check_visible_values,
    check_overflow,
    check_single_gradients,
    check_split_passes,
    check_float64,
    check_work,
    check_split_work,
    check_hidden_values,
    check_memory,
    check_untrusted_integers,
    check_huge_strides,
)
