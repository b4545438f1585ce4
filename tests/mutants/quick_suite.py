"""A compact slice of the suite for many copies of the package: prints one JSON object, copy -> first failure, or null if all passed.

    python quick_suite.py COPY...        each COPY is a folder that holds a package fused_attention

Importing torch takes longer than the checks, so it is done once, and each copy runs in a fork of this process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.attention.bias  # with sympy behind it, the costly part of importing the package
import torch.nn.functional
import torch.utils.flop_counter

CASES = (
    "everything", "packed-everything", "base", "causal+gqa", "long-window", "far-offset", "no-visible-keys-sinks", "no-keys",
    "offset-members", "window-both", "window-right", "kv-range", "kv-untrusted", "mask-bh1k", "bias-1h11", "bias-hides", "alibi-offset",
    "alibi-batch", "softcap", "sinks", "dropout-gqa-causal", "dropout-all", "scale-negative", "mqa", "large-scores", "head_dim_v",
    "packed-causal", "packed-dropout", "packed-alibi-members", "packed-unused-sinks", "gemma", "self-bfloat16", "everything-float64",
)  # fmt: skip


def check_cases() -> None:
    from fused_attention import blockwise
    from fused_attention.testing import CASES as ALL
    from fused_attention.testing import check

    blockwise.BLOCK = 8
    named = {case.name: case for case in ALL}
    for name in CASES:
        inputs = named[name].make()
        truth = inputs.truth()
        for backend in ("torch", "reference"):
            check(inputs.run(backend), truth)


def check_gradients_of_out_alone() -> None:
    from fused_attention.testing import CASES as ALL
    from fused_attention.testing import check

    for name in ("self", "mqa", "softcap", "head-dim-65"):
        inputs = next(case for case in ALL if case.name == name).make().changed(dlse=None)
        check(inputs.run("torch"), inputs.truth())


def check_weights(defined: bool = True) -> None:
    from fused_attention import attention_weights, cpu_weights
    from fused_attention.testing import CASES as ALL
    from fused_attention.testing import Case

    if defined:
        cpu_weights.computes = lambda *_: False
    cases = [case for case in ALL if case.name in ("everything", "many-heads", "no-visible-keys", "first-rows-empty")]
    for case in (*cases, Case("tiles", batch=1, seqlen_q=39, seqlen_k=270, causal=True, kv_lengths=((140, 270),))):
        inputs = case.make()
        truth = inputs.truth(backward=False)
        weights = attention_weights(inputs.q, inputs.k, truth.lse.float(), **inputs.options)
        mean = attention_weights(inputs.q, inputs.k, truth.lse.float(), average_heads=True, **inputs.options)
        for member in range(truth.call.batch):
            heads = [truth.call.head(member, index) for index in range(truth.call.heads)]
            expected = torch.stack([head.weights if head.dropout is None else head.weights * head.dropout for head in heads])
            torch.testing.assert_close(weights[member].double(), expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mean[member].double(), expected.mean(0), rtol=1e-4, atol=1e-6)


def check_merge() -> None:
    from fused_attention import merge_attention
    from fused_attention.testing import Case

    inputs = Case("merge", sinks=True).make(dtype=torch.float64)
    sinks, parts = inputs.options["sinks"], []
    for cut in (slice(0, 5), slice(5, 5), slice(5, 17)):
        part = inputs.changed(k=inputs.k[:, :, cut], v=inputs.v[:, :, cut], options={"sinks": None}).truth(backward=False)
        parts.append((part.out, part.lse))
    merged = merge_attention(*zip(*parts, strict=True), sinks=sinks)
    truth = inputs.truth(backward=False)
    torch.testing.assert_close(merged.out, truth.out)
    torch.testing.assert_close(merged.lse, truth.lse)


def check_sdpa() -> None:
    from fused_attention import scaled_dot_product_attention

    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    visible = torch.rand(2, 1, 5, 9) < 0.7
    for options in ({"is_causal": True}, {"attn_mask": torch.randn(5, 9)}, {"attn_mask": visible, "scale": 0.3}):
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, v, **options), torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        )


def check_broken_keys() -> None:
    from fused_attention import blockwise
    from fused_attention.testing import Case, check

    blockwise.BLOCK = 8
    inputs = Case("hidden", kv_lengths=(9, 12)).make()
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, 14:], v[:, :, 14:] = torch.nan, torch.inf
    for backend in ("torch", "reference"):
        check(inputs.changed(k=k, v=v).run(backend), inputs.truth())


def check_broken_future() -> None:
    from fused_attention import attention

    q = torch.randn(1, 2, 8, 16)
    v = torch.cat((q[:, :, :5], torch.full_like(q[:, :, 5:], torch.nan)), dim=2)
    out = attention(q, q, v, causal=True, backend="torch")
    torch.testing.assert_close(out[:, :, :5], attention(q, q, q, causal=True, backend="reference")[:, :, :5])


def check_calls_near_torchs_own_kernel() -> None:
    from fused_attention import attention_with_lse

    q = torch.randn(2, 2, 8, 16)
    one_sees_nothing = torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 8)
    for options in ({"causal": True, "window": (2, None)}, {"mask": one_sees_nothing}):
        ours, definition = (attention_with_lse(q, q, q, backend=backend, **options) for backend in ("torch", "reference"))
        torch.testing.assert_close(ours, definition)


CPU_CASES = (
    "long", "long-causal", "long-window", "base", "causal+gqa", "window-both", "kv-range-window", "kv-untrusted", "first-rows-empty",
    "far-offset", "offset-members", "head-dim-65", "head_dim_v", "no-visible-keys", "scale-zero", "scale", "many-heads", "layout-strided",
    "everything", "packed-everything", "packed-cross", "mask-bh1k", "mask-b1q1", "bias-1hqk", "bias-1hq1", "bias-cap-dropout",
    "alibi-offset", "alibi-batch", "sinks", "softcap", "dropout-gqa-causal", "self-bfloat16", "everything-float16",
)  # fmt: skip


def check_pairs() -> None:
    """In bfloat16 some kernels add up pairs, and the last dim, query or key may be alone."""
    from fused_attention.testing import Case, check

    base = Case("pairs", batch=1, seqlen_q=37, seqlen_k=139, head_dim=25, dtype=torch.bfloat16)
    few = replace(base, seqlen_q=11, seqlen_k=11, causal=True, offset=-1)
    for case in (base, replace(few, seqlen_q=12, seqlen_k=12, causal=False), few):
        inputs = case.make()
        check(inputs.run("cpu"), inputs.truth())
    hidden = replace(base, kv_lengths=((2, 133),), causal=True).make()
    k, v = hidden.k.clone(), hidden.v.clone()
    k[:, :, 133], v[:, :, 133] = torch.nan, torch.inf
    check(hidden.changed(k=k, v=v).run("cpu"), hidden.truth())


def check_cpu_kernels() -> None:
    from fused_attention.testing import CASES as ALL
    from fused_attention.testing import Case, check

    check_weights(defined=False)
    check_pairs()
    cases = [case for case in ALL if case.name in CPU_CASES]
    for inputs in [case.make() for case in cases]:
        check(inputs.run("cpu"), inputs.truth())
        alone = inputs.changed(dlse=None)
        check(alone.run("cpu"), alone.truth())
    decoding = Case("decoding", heads=4, kv_heads=2, seqlen_q=1, seqlen_k=2071, head_dim=16, magnitude=4.0).make()
    check(decoding.run("cpu", backward=False), decoding.truth(backward=False))
    two_blocks = Case("two-blocks", heads=2, seqlen_k=257, bias="1hq1").make()
    check(two_blocks.run("cpu"), two_blocks.truth())
    hidden = Case("hidden", kv_lengths=(9, 12)).make()
    k, v = hidden.k.clone(), hidden.v.clone()
    k[:, :, 14:], v[:, :, 14:] = torch.nan, torch.inf
    check(hidden.changed(k=k, v=v).run("cpu"), hidden.truth())
    partly = Case("partly-hidden", causal=True, seqlen_q=19, seqlen_k=19).make()
    v = partly.v.clone()
    v[:, :, 12] = torch.nan
    out = partly.changed(v=v).run("cpu", backward=False)["out"]
    truth = partly.truth(backward=False)
    out[:, :, 12:] = truth.out[:, :, 12:].float()
    check(out, truth)


CHECKS: tuple[Callable[[], None], ...] = (
    check_cases,
    check_gradients_of_out_alone,
    check_weights,
    check_merge,
    check_sdpa,
    check_broken_keys,
    check_broken_future,
    check_calls_near_torchs_own_kernel,
)


def first_failure(copy: str) -> str | None:
    sys.path.insert(0, copy)
    try:
        import fused_attention

        if not str(fused_attention.__file__).startswith(copy):
            return f"imported {fused_attention.__file__} instead of the copy"
        # A copy with compiled kernels was made for their sake. (Another one may find those of an editable installation.)
        for run in (check_cpu_kernels,) if list(Path(copy).glob("fused_attention/_cpu*.so")) else CHECKS:
            run()
    except Exception:  # noqa: BLE001  # any failure at all is what a fault is looked for by
        return traceback.format_exc(limit=-1)
    return None


def in_fork(copy: str) -> str | None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            json.dump(first_failure(copy), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else "the process died"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({copy: in_fork(copy) for copy in sys.argv[1:]}))
