"""Attention of a few queries to keys in pages, which the C++ kernels read where they lie."""

from __future__ import annotations

from torch import Tensor

from .cpu_arguments import Arguments
from .cpu_backend import threads
from .problem import Layout, Problem, empty_output


def attend(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor, problem: Problem) -> Tensor | None:
    """The output of a problem of the cpu backend that needs no gradient, or None where the kernels for pages do not suit it.

    k, v: (pages, kv_heads, page_size, head_dim or head_dim_v). page_table: (batch, pages of a member), int32, rows of any stride: its
    values are cut to the pages there are. problem: with page_size keys for each of a member's pages.
    """
    from . import _cpu

    out = empty_output(q, problem.head_dim_v)
    lse = q.new_empty(q.shape[:3], dtype=problem.accumulate_dtype)
    keys = (len(page_table), k.shape[1], page_table.shape[1] * k.shape[2])
    problem = problem._replace(k=Layout((*keys, k.shape[3]), k.stride()), v=Layout((*keys, v.shape[3]), v.stride()))
    call = Arguments(q, k, v, out, lse, problem)
    pages = (page_table.data_ptr(), page_table.stride(0), len(k), k.shape[2])
    return out if _cpu.decode_pages(call.tensors, call.sizes, call.visible, call.options, threads(), pages) else None
