"""Wrong calls: each raises its type and a sentence with the argument and what it got; the same under python -O, where asserts vanish.

Run as a script, it checks the whole table without pytest and without an assert.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fused_attention import (
    attention,
    attention_varlen,
    attention_varlen_with_lse,
    attention_weights,
    attention_with_lse,
    explain,
    merge_attention,
    scaled_dot_product_attention,
)

NAN, INF = float("nan"), float("inf")


class Wrong(NamedTuple):
    """A call, what it must raise, and fragments that the message must hold in this order."""

    call: Callable[[], Any]
    error: type[Exception]
    fragments: tuple[str, ...]


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


Q, K, V = ones(2, 6, 5, 8), ones(2, 3, 7, 8), ones(2, 3, 7, 4)
PACKED = ones(11, 6, 8), ones(13, 3, 8), ones(13, 3, 4)
CU_Q, CU_K = torch.tensor([0, 4, 11]), torch.tensor([0, 7, 13])
LSE = ones(2, 6, 5)


def dense(error: type[Exception], *fragments: str, q: Any = Q, k: Any = K, v: Any = V, **options: Any) -> Wrong:
    return Wrong(lambda: attention(q, k, v, **options), error, fragments)


def packed(error: type[Exception], *fragments: str, cu_q: Any = CU_Q, cu_k: Any = CU_K, **options: Any) -> Wrong:
    q, k, v = (options.pop(name, tensor) for name, tensor in zip("qkv", PACKED, strict=True))
    return Wrong(lambda: attention_varlen(q, k, v, cu_q, cu_k, **options), error, fragments)


def weights(error: type[Exception], *fragments: str, q: Any = Q, k: Any = K, lse: Any = LSE, **options: Any) -> Wrong:
    return Wrong(lambda: attention_weights(q, k, lse, **options), error, fragments)


def merge(error: type[Exception], *fragments: str, outs: Any = (), lses: Any = (), **options: Any) -> Wrong:
    return Wrong(lambda: merge_attention(outs, lses, **options), error, fragments)


def sdpa(*fragments: str, q: Any = None, k: Any = None, v: Any = None, **options: Any) -> Wrong:
    given = [ones(2, 6, 7, 8) if tensor is None else tensor for tensor in (q, k, v)]
    return Wrong(lambda: scaled_dot_product_attention(*given, **options), RuntimeError, fragments)


WRONG: dict[str, Wrong] = {
    "q is no tensor": dense(TypeError, "q", "list", q=[1.0]),
    "k is no tensor": dense(TypeError, "k", "NoneType", k=None),
    "v is no tensor": dense(TypeError, "v", "float", v=1.0),
    "q of 3 dimensions": dense(ValueError, "q", "3 dimensions", "(6, 5, 8)", "(batch, heads, seqlen, head_dim)", q=Q[0]),
    "k of 5 dimensions": dense(ValueError, "k", "5 dimensions", k=K[None]),
    "v of 2 dimensions": dense(ValueError, "v", "2 dimensions", v=ones(7, 4)),
    "q of another dtype": dense(TypeError, "q is torch.float16", "k is torch.float32", "v is torch.float32", q=Q.half()),
    "k of another dtype": dense(TypeError, "k is torch.bfloat16", k=K.bfloat16()),
    "v of another dtype": dense(TypeError, "v is torch.float64", v=V.double()),
    "all of int dtype": dense(TypeError, "q is torch.int64", "float16", q=Q.long(), k=K.long(), v=V.long()),
    "all complex": dense(TypeError, "q is torch.complex64", q=Q.cfloat(), k=K.cfloat(), v=V.cfloat()),
    "all bool": dense(TypeError, "q is torch.bool", q=Q.bool(), k=K.bool(), v=V.bool()),
    "q on another device": dense(ValueError, "q is on meta", "k on cpu", q=ones(2, 6, 5, 8, device="meta")),
    "k on another device": dense(ValueError, "k on meta", k=ones(2, 3, 7, 8, device="meta")),
    "v on another device": dense(ValueError, "v on meta", v=ones(2, 3, 7, 4, device="meta")),
    "head_dim differs": dense(ValueError, "q has head_dim 8", "k has 9", k=ones(2, 3, 7, 9)),
    "head_dim 0": dense(ValueError, "head_dim is 0", q=ones(2, 6, 5, 0), k=ones(2, 3, 7, 0)),
    "head_dim_v 0": dense(ValueError, "head_dim_v 0", v=ones(2, 3, 7, 0)),
    "k and v of other lengths": dense(ValueError, "k has shape (2, 3, 7, 8)", "v has (2, 3, 6, 4)", v=ones(2, 3, 6, 4)),
    "k and v of other heads": dense(ValueError, "k has shape (2, 3, 7, 8)", "v has (2, 6, 7, 4)", v=ones(2, 6, 7, 4)),
    "batch differs": dense(ValueError, "q has batch 5", "k has 2", q=ones(5, 6, 5, 8)),
    "batch of 1 is not broadcast": dense(ValueError, "q has batch 2", "k has 1", k=ones(1, 3, 7, 8), v=ones(1, 3, 7, 4)),
    "heads no multiple": dense(ValueError, "q has 4 heads", "k has 3", q=ones(2, 4, 5, 8)),
    "fewer heads than kv_heads": dense(ValueError, "q has 1 heads", "k has 3", q=ones(2, 1, 5, 8)),
    "no kv_heads": dense(ValueError, "k has 0", k=ones(2, 0, 7, 8), v=ones(2, 0, 7, 4)),
    "no heads": dense(ValueError, "q has 0 heads", q=ones(2, 0, 5, 8)),
    "seqlen before heads": dense(
        ValueError, "q has 5 heads, k has 7", "layout", q=Q.mT.permute(0, 3, 1, 2), k=K.transpose(1, 2), v=V.transpose(1, 2)
    ),
    "causal is an int": dense(TypeError, "causal is 1", causal=1),
    "causal is a string": dense(TypeError, "causal is 'yes'", causal="yes"),
    "causal is a tensor": dense(TypeError, "causal is tensor(True)", causal=torch.tensor(True)),
    "window is an int": dense(TypeError, "window is 4", "(left, right)", window=4),
    "window of three": dense(TypeError, "window is (1, 2, 3)", window=(1, 2, 3)),
    "window of one": dense(TypeError, "window is (1,)", window=(1,)),
    "window left negative": dense(ValueError, "window left is -1", "None", window=(-1, 0)),
    "window right negative": dense(ValueError, "window right is -2", window=(None, -2)),
    "window of floats": dense(TypeError, "window left is 1.5", window=(1.5, 2)),
    "window of bools": dense(TypeError, "window right is True", window=(0, True)),
    "window right with causal": dense(ValueError, "causal=True", "window right 3", causal=True, window=(2, 3)),
    "offset is a float": dense(TypeError, "offset is 1.5", offset=1.5),
    "offset is a bool": dense(TypeError, "offset is True", offset=True),
    "offset is a string": dense(TypeError, "offset is 'bottom_right'", offset="bottom_right"),
    "offset of floats": dense(TypeError, "offset is torch.float32", "int32", offset=ones(2)),
    "offset of another batch": dense(ValueError, "offset has shape (3,)", "(2,)", offset=torch.zeros(3, dtype=torch.int32)),
    "offset of 2 dimensions": dense(ValueError, "offset has shape (2, 1)", offset=torch.zeros(2, 1, dtype=torch.int32)),
    "offset on another device": dense(
        ValueError, "offset is on meta", "offset.to(q.device)", offset=torch.zeros(2, dtype=torch.int32, device="meta")
    ),
    "mask is a list": dense(TypeError, "mask is a list", mask=[[True]]),
    "mask is floating": dense(TypeError, "mask is torch.float32", "bias", mask=ones(5, 7)),
    "mask is uint8": dense(TypeError, "mask is torch.uint8", ".bool()", mask=ones(5, 7, dtype=torch.uint8)),
    "mask for padding": dense(ValueError, "mask has shape (2, 7)", "(5, 7)", "mask[:, None, None, :]", mask=ones(2, 7).bool()),
    "mask of 3 dimensions": dense(ValueError, "mask has shape (2, 5, 7)", mask=ones(2, 5, 7).bool()),
    "mask of kv_heads": dense(ValueError, "mask has shape (2, 3, 5, 7)", "(2, 6, 5, 7)", mask=ones(2, 3, 5, 7).bool()),
    "mask of another batch": dense(ValueError, "mask has shape (3, 1, 5, 7)", mask=ones(3, 1, 5, 7).bool()),
    "mask too long": dense(ValueError, "mask has shape (1, 1, 5, 8)", mask=ones(1, 1, 5, 8).bool()),
    "mask transposed": dense(ValueError, "mask has shape (7, 5)", mask=ones(7, 5).bool()),
    "mask of one row in 2 dimensions": dense(ValueError, "mask has shape (1, 7)", mask=ones(1, 7).bool()),
    "mask on another device": dense(ValueError, "mask is on meta", mask=ones(5, 7, device="meta").bool()),
    "bias is bool": dense(TypeError, "bias is torch.bool", "mask", bias=ones(5, 7).bool()),
    "bias is int": dense(TypeError, "bias is torch.int64", bias=ones(5, 7).long()),
    "bias is a number": dense(TypeError, "bias is a float", bias=0.5),
    "bias for padding": dense(ValueError, "bias has shape (2, 7)", "bias[:, None, None, :]", bias=ones(2, 7)),
    "bias of another length": dense(ValueError, "bias has shape (5, 6)", "(5, 7)", bias=ones(5, 6)),
    "bias of 1 dimension": dense(ValueError, "bias has shape (7,)", bias=ones(7)),
    "bias on another device": dense(ValueError, "bias is on meta", bias=ones(5, 7, device="meta")),
    "kv_lengths is a list": dense(TypeError, "kv_lengths is a list", kv_lengths=[7, 7]),
    "kv_lengths of floats": dense(TypeError, "kv_lengths is torch.float32", kv_lengths=ones(2)),
    "kv_lengths of int16": dense(TypeError, "kv_lengths is torch.int16", "int32", kv_lengths=ones(2, dtype=torch.int16)),
    "kv_lengths of another batch": dense(ValueError, "kv_lengths has shape (3,)", "(2,)", kv_lengths=torch.ones(3).int()),
    "kv_lengths of three columns": dense(ValueError, "kv_lengths has shape (2, 3)", "(2, 2)", kv_lengths=torch.ones(2, 3).int()),
    "kv_lengths a scalar": dense(ValueError, "kv_lengths has shape ()", kv_lengths=torch.tensor(7)),
    "kv_lengths on another device": dense(ValueError, "kv_lengths is on meta", kv_lengths=torch.ones(2, device="meta").int()),
    "alibi_slopes is a list": dense(TypeError, "alibi_slopes is list", alibi_slopes=[0.5] * 6),
    "alibi_slopes of ints": dense(TypeError, "alibi_slopes is torch.int64", alibi_slopes=torch.ones(6).long()),
    "alibi_slopes of kv_heads": dense(ValueError, "alibi_slopes has shape (3,)", "(6,)", "(2, 6)", alibi_slopes=ones(3)),
    "alibi_slopes transposed": dense(ValueError, "alibi_slopes has shape (6, 2)", alibi_slopes=ones(6, 2)),
    "alibi_slopes on another device": dense(ValueError, "alibi_slopes is on meta", alibi_slopes=ones(6, device="meta")),
    "softcap 0": dense(ValueError, "softcap is 0", "above 0", softcap=0.0),
    "softcap negative": dense(ValueError, "softcap is -1.0", softcap=-1.0),
    "softcap infinite": dense(ValueError, "softcap is inf", softcap=INF),
    "softcap nan": dense(ValueError, "softcap is nan", softcap=NAN),
    "softcap is a string": dense((TypeError, ValueError), "softcap is 'big'", softcap="big"),  # type: ignore[arg-type]
    "sinks is a number": dense(TypeError, "sinks is float", sinks=0.5),
    "sinks of ints": dense(TypeError, "sinks is torch.int32", sinks=torch.ones(6).int()),
    "sinks of kv_heads": dense(ValueError, "sinks has shape (3,)", "(6,)", sinks=ones(3)),
    "sinks of batch and heads": dense(ValueError, "sinks has shape (2, 6)", sinks=ones(2, 6)),
    "sinks on another device": dense(ValueError, "sinks is on meta", sinks=ones(6, device="meta")),
    "dropout_p above 1": dense(ValueError, "dropout_p is 1.5", "0 to 1", dropout_p=1.5),
    "dropout_p negative": dense(ValueError, "dropout_p is -0.1", dropout_p=-0.1),
    "dropout_p nan": dense(ValueError, "dropout_p is nan", dropout_p=NAN),
    "dropout_p is a bool": dense(TypeError, "dropout_p is True", dropout_p=True),
    "dropout_p is a tensor": dense(TypeError, "dropout_p is tensor(0.5", dropout_p=torch.tensor(0.5)),
    "dropout_seed is an int": dense(TypeError, "dropout_seed is int", "(seed, offset)", dropout_p=0.5, dropout_seed=3),
    "dropout_seed of int32": dense(TypeError, "dropout_seed is torch.int32", dropout_p=0.5, dropout_seed=torch.ones(2).int()),
    "dropout_seed of one": dense(ValueError, "dropout_seed has shape (1,)", "(2,)", dropout_p=0.5, dropout_seed=torch.ones(1).long()),
    "dropout_seed elsewhere": dense(ValueError, "dropout_seed is on meta", dropout_p=0.5, dropout_seed=torch.ones(2, device="meta").long()),
    "dropout_seed without dropout": dense(ValueError, "dropout_seed has shape (3,)", dropout_seed=torch.ones(3).long()),
    "scale infinite": dense(ValueError, "scale is inf", "finite", scale=INF),
    "scale nan": dense(ValueError, "scale is nan", scale=NAN),
    "scale is a string": dense(TypeError, "scale is 'auto'", scale="auto"),
    "scale is a bool": dense(TypeError, "scale is True", scale=True),
    "scale is a tensor": dense(TypeError, "scale is tensor(0.5", scale=torch.tensor(0.5)),
    "backend unknown": dense(ValueError, "backend is 'magic'", "'torch'", "'reference'", backend="magic"),
    "backend elsewhere": dense(NotImplementedError, "backend='cuda' can't run this call: ", backend="cuda"),
    "an option that does not exist": dense(TypeError, "is_causal", is_causal=True),
    "with_lse checks the same": Wrong(lambda: attention_with_lse(Q, K, V, softcap=-1.0), ValueError, ("softcap is -1.0",)),
    "explain checks the same": Wrong(lambda: explain(Q, K, V, window=(-1, 0)), ValueError, ("window left is -1",)),
    "packed with a mask": packed(TypeError, "mask", "packed", mask=ones(11, 13).bool()),
    "packed with a bias": packed(TypeError, "bias", "packed", bias=ones(11, 13)),
    "packed with an unknown option": packed(TypeError, "max_seqlen", max_seqlen=7),
    "packed with lse and a mask": Wrong(
        lambda: attention_varlen_with_lse(*PACKED, CU_Q, CU_K, mask=ones(11, 13).bool()), TypeError, ("mask", "packed")
    ),
    "packed q of 4 dimensions": packed(ValueError, "q", "4 dimensions", "(total, heads, head_dim)", q=Q),
    "packed heads": packed(ValueError, "q has 4 heads", "k has 3", q=ones(11, 4, 8)),
    "cu_seqlens_q is a list": packed(TypeError, "cu_seqlens_q is a list", cu_q=[0, 4, 11]),
    "cu_seqlens_q is None": packed(TypeError, "cu_seqlens_q is a NoneType", cu_q=None),
    "cu_seqlens_k is a list": packed(TypeError, "cu_seqlens_k is a list", cu_k=[0, 7, 13]),
    "cu_seqlens_q of floats": packed(TypeError, "cu_seqlens_q is torch.float32", cu_q=CU_Q.float()),
    "cu_seqlens_k of int16": packed(TypeError, "cu_seqlens_k is torch.int16", cu_k=CU_K.short()),
    "cu_seqlens_q of 2 dimensions": packed(ValueError, "cu_seqlens_q has shape (1, 3)", "(batch + 1,)", cu_q=CU_Q[None]),
    "cu_seqlens_q empty": packed(ValueError, "cu_seqlens_q has shape (0,)", cu_q=CU_Q[:0], cu_k=CU_K[:0]),
    "cu_seqlens of other batches": packed(ValueError, "cu_seqlens_q has 3", "cu_seqlens_k has 2", cu_k=CU_K[:2]),
    "cu_seqlens_q elsewhere": packed(ValueError, "cu_seqlens_q is on meta", cu_q=CU_Q.to("meta")),
    "packed offset": packed(ValueError, "offset has shape (11,)", "(2,)", offset=torch.zeros(11).int()),
    "packed kv_lengths": packed(ValueError, "kv_lengths has shape (3,)", kv_lengths=torch.zeros(3).int()),
    "packed alibi_slopes": packed(ValueError, "alibi_slopes has shape (11, 6)", "(2, 6)", alibi_slopes=ones(11, 6)),
    "weights with another lse": weights(ValueError, "lse has shape (2, 3, 5)", "(2, 6, 5)", lse=ones(2, 3, 5)),
    "weights without a seed": weights(ValueError, "dropout_p is 0.5", "dropout_seed", dropout_p=0.5),
    "weights with a float mask": weights(TypeError, "mask is torch.float32", mask=ones(5, 7)),
    "merge of nothing": merge(ValueError, "outs has 0 parts", "lses has 0"),
    "merge of other counts": merge(ValueError, "outs has 2 parts", "lses has 1", outs=[Q, Q], lses=[LSE]),
    "merge of other shapes": merge(ValueError, "part 1", "(2, 6, 5, 7)", outs=[Q, ones(2, 6, 5, 7)], lses=[LSE, LSE]),
    "merge of another lse": merge(ValueError, "part 0", "(2, 6, 4)", outs=[Q], lses=[ones(2, 6, 4)]),
    "merge with other sinks": merge(ValueError, "sinks has shape (3,)", outs=[Q], lses=[LSE], sinks=ones(3)),
    "sdpa dtypes": sdpa("query.dtype: torch.float32", "key.dtype: torch.float16", k=ones(2, 6, 7, 8).half()),
    "sdpa dimensions": sdpa("query.dim: 1", q=ones(8)),
    "sdpa mask and is_causal": sdpa("attn_mask", "is_causal=True", attn_mask=ones(7, 7).bool(), is_causal=True),
    "sdpa mask shape": sdpa("7, 6)", attn_mask=ones(7, 6).bool()),
    "sdpa mask dtype": sdpa("attn_mask.dtype: ", attn_mask=ones(7, 7).long()),
    "sdpa heads": sdpa("4", "6", k=ones(2, 4, 7, 8), v=ones(2, 4, 7, 8)),
    "sdpa gqa heads": sdpa("q has 6 heads, k has 4", k=ones(2, 4, 7, 8), v=ones(2, 4, 7, 8), enable_gqa=True),
    "sdpa head_dim": sdpa("head_dim 8", "9", k=ones(2, 6, 7, 9)),
}


def verdict(wrong: Wrong) -> str | None:
    """What is wrong with the way a wrong call was answered, or None."""
    try:
        wrong.call()
    except Exception as error:  # noqa: BLE001  # which one it is, is the question
        if not isinstance(error, wrong.error):
            return f"raised {type(error).__name__}: {error}"
        rest = str(error)
        for fragment in wrong.fragments:
            if fragment not in rest:
                return f"the message lacks {fragment!r} (in this order): {error}"
            rest = rest[rest.index(fragment) :]
        return None
    return "was accepted"


def all_verdicts() -> dict[str, str]:
    return {name: answer for name, wrong in WRONG.items() if (answer := verdict(wrong)) is not None}


def pytest_generate_tests(metafunc: Any) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", WRONG)


def test_a_wrong_call_is_rejected_with_a_sentence(name):
    answer = verdict(WRONG[name])
    assert answer is None, f"{name}: {answer}"


def test_the_table_is_large_and_its_base_calls_are_right():
    """A rejection means nothing where the call was wrong for another reason."""
    assert len(WRONG) >= 80
    attention(Q, K, V)
    attention_varlen(*PACKED, CU_Q, CU_K)
    attention_weights(Q, K, LSE)
    merge_attention([Q], [LSE])
    scaled_dot_product_attention(*[ones(2, 6, 7, 8)] * 3)


def test_a_right_call_would_be_noticed():
    assert verdict(dense(ValueError, "q")) == "was accepted"
    assert "lacks 'seqlen'" in str(verdict(dense(ValueError, "softcap", "seqlen", softcap=-1.0)))
    assert "raised ValueError" in str(verdict(dense(TypeError, "softcap", softcap=-1.0)))


def test_the_whole_table_without_asserts():
    """Under python -O an assert checks nothing: rejections must not depend on one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-O", __file__], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip() == f"{len(WRONG)} wrong calls rejected, debug is False"


if __name__ == "__main__":
    answers = all_verdicts()
    for name, answer in answers.items():
        print(f"{name}: {answer}")
    if not answers:
        print(f"{len(WRONG)} wrong calls rejected, debug is {__debug__}")
    raise SystemExit(len(answers))
