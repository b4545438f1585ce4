"""Checking a call: the Problem it states, or the sentence that says what is wrong with it and what to do.

Shapes, dtypes and devices are checked, values on a device never: that would wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import FAR, Gradients, Layout, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    packed: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Problem:
    """The problem of a call, or a TypeError or ValueError that names the argument, what it got, what was expected and what to do."""
    packed = packed or cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_tensors(q, k, v, packed)
    batch = q.shape[0]
    if packed:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        batch = _check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    left, right = _check_window(causal, window)
    if offset is not None:
        _check_offset(offset, batch, q)
    if kv_lengths is not None:
        _check_index("kv_lengths", kv_lengths, q)
        if tuple(kv_lengths.shape) not in ((batch,), (batch, 2)):
            raise ValueError(
                f"kv_lengths has shape {tuple(kv_lengths.shape)}, expected ({batch},) or ({batch}, 2): [start, end) of each member's keys"
            )
    if mask is not None or bias is not None:
        _check_mask_and_bias(mask, bias, q, k)
    if alibi_slopes is not None:
        _check_per_head("alibi_slopes", alibi_slopes, q, ((q.shape[1],), (batch, q.shape[1])))
    if sinks is not None:
        _check_per_head("sinks", sinks, q, ((q.shape[1],),))
    largest = torch.finfo(torch.float64 if q.dtype is torch.float64 else torch.float32).max
    if softcap is not None and (isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0.0 < softcap <= largest):
        raise ValueError(f"softcap is {softcap!r}, expected a finite number above 0, or None for no cap")
    _check_dropout(dropout_p, dropout_seed, q)
    return Problem(
        q=Layout.of(q),
        k=Layout.of(k),
        v=Layout.of(v),
        dtype=q.dtype,
        device=q.device,
        scale=_check_scale(scale, q.shape[-1], largest),
        window_left=left,
        window_right=right,
        offset=offset if isinstance(offset, Tensor) else _near(offset),
        mask=mask,
        bias=bias,
        kv_lengths=kv_lengths,
        alibi_slopes=alibi_slopes,
        softcap=None if softcap is None else float(softcap),
        sinks=sinks,
        dropout_p=float(dropout_p),
        dropout_seed=dropout_seed if dropout_p > 0 else None,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        gradients=_gradients(q, k, v, bias, alibi_slopes, sinks),
    )


def _gradients(*inputs: Tensor | None) -> frozenset[str]:
    if not torch.is_grad_enabled():
        return frozenset()
    return frozenset(name for name, tensor in zip(Gradients._fields, inputs, strict=True) if tensor is not None and tensor.requires_grad)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    rank, layout = (3, "(total, heads, head_dim)") if packed else (4, "(batch, heads, seqlen, head_dim)")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor {layout}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise TypeError(
                f"{name} is a {kind} tensor, expected a strided one {layout}; attention() alone takes nested tensors, all three"
            )
        if tensor.dim() != rank:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}: expected {layout}")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        raise TypeError(
            f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}: all three must have one dtype of float16, bfloat16, float32, float64; "
            "convert them, or call under torch.autocast"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move all three to one device")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head_dim {q.shape[-1]}, k has {k.shape[-1]}: they must be equal (only v may have its own)")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"head_dim is {q.shape[-1]}, head_dim_v {v.shape[-1]}: both must be at least 1")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k has shape {tuple(k.shape)}, v has {tuple(v.shape)}: all but head_dim must agree")
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k has {k.shape[0]}: expand the smaller one, a stride of 0 costs no copy")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"q has {heads} heads, k has {kv_heads}: heads must be a multiple of kv_heads, both at least 1 (the layout is {layout})"
        )


def _check_window(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r}, expected True or False")
    if window is None:
        return None, 0 if causal else None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window is {window!r}, expected a pair (left, right), each an int of at least 0 or None for unbounded")
    left, right = window
    for name, side in (("left", left), ("right", right)):
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window {name} is {side!r}, expected an int of at least 0 or None for unbounded")
        if side < 0:
            raise ValueError(f"window {name} is {side}, expected an int of at least 0, or None for unbounded (not -1)")
    if causal and right is not None and right > 0:
        raise ValueError(f"causal=True with window right {right}: a causal query sees no later key; pass 0 or None, or causal=False")
    return _near(left), 0 if causal else _near(right)


def _near(number: int | None) -> int | None:
    return None if number is None else max(-FAR, min(number, FAR))


def _check_index(name: str, tensor: Tensor | None, q: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected an int32 or int64 tensor on {q.device}")
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}, expected int32 or int64: convert it with .to(torch.int32)")
    _check_device(name, tensor, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: move it with {name}.to(q.device)")


def _check_offset(offset: int | Tensor, batch: int, q: Tensor) -> None:
    if isinstance(offset, Tensor):
        _check_index("offset", offset, q)
        if tuple(offset.shape) != (batch,):
            raise ValueError(f"offset has shape {tuple(offset.shape)}, expected ({batch},): one for each batch member, or an int for all")
    elif isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset is {offset!r}, expected an int, an int tensor ({batch},), or None for seqlen_k - seqlen_q")


def _check_cu_seqlens(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, q: Tensor) -> int:
    """The number of packed members."""
    entries = []
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_index(name, tensor, q)
        if tensor is None or tensor.dim() != 1 or tensor.shape[0] < 1:
            shape = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{name} has shape {shape}, expected (batch + 1,): 0, then the running total of the lengths")
        entries.append(tensor.shape[0])
    if entries[0] != entries[1]:
        raise ValueError(f"cu_seqlens_q has {entries[0]} entries, cu_seqlens_k has {entries[1]}: both need batch + 1")
    return entries[0] - 1


def _check_mask_and_bias(mask: Tensor | None, bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if name == "mask" and tensor.dtype is not torch.bool:
            hint = "pass it as bias=, which is added to the scores" if tensor.is_floating_point() else "convert it with .bool()"
            raise TypeError(f"mask is {tensor.dtype}, expected bool with True = may attend: {hint}")
        if name == "bias" and not tensor.is_floating_point():
            hint = "pass it as mask=, True = may attend" if tensor.dtype is torch.bool else "convert it to a floating dtype"
            raise TypeError(f"bias is {tensor.dtype}, expected a floating dtype: {hint}")
        _check_device(name, tensor, q)
        fits = tensor.dim() == 4 and all(size in (1, whole) for size, whole in zip(tensor.shape, full, strict=True))
        if not fits and tuple(tensor.shape) != full[2:]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {full[2:]} = (seqlen_q, seqlen_k), or 4 dimensions with each size 1 "
                f"or that of (batch, heads, seqlen_q, seqlen_k) = {full}; "
                f"a padding mask (batch, seqlen_k) goes in as {name}[:, None, None, :]"
            )


def _check_per_head(name: str, tensor: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} is {got}, expected a floating tensor on {q.device}, one value a head")
    _check_device(name, tensor, q)
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}: one value for each of q's heads")


def _check_dropout(dropout_p: float, dropout_seed: Tensor | None, q: Tensor) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p is {dropout_p!r}, expected a number from 0 to 1")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected a probability from 0 to 1")
    if dropout_seed is None:
        return
    if not isinstance(dropout_seed, Tensor) or dropout_seed.dtype is not torch.int64:
        got = dropout_seed.dtype if isinstance(dropout_seed, Tensor) else type(dropout_seed).__name__
        raise TypeError(f"dropout_seed is {got}, expected an int64 tensor (2,) = (seed, offset) on {q.device}")
    if tuple(dropout_seed.shape) != (2,):
        raise ValueError(f"dropout_seed has shape {tuple(dropout_seed.shape)}, expected (2,) = (seed, offset)")
    _check_device("dropout_seed", dropout_seed, q)


def _check_scale(scale: float | None, head_dim: int, largest: float) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale is {scale!r}, expected a finite number, or None for head_dim ** -0.5")
    if scale != scale or abs(scale) > largest:
        raise ValueError(f"scale is {scale}, expected a number that is finite in the scores' precision, or None for head_dim ** -0.5")
    return float(scale)
