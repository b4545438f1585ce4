"""Attention of a few queries to keys in pages, which the CUDA kernels read where they lie."""

from __future__ import annotations

from torch import Tensor

from . import cuda_backend
from .problem import Layout, Problem, empty_results


def attend(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor, problem: Problem) -> Tensor | None:
    """The output of a problem of the cuda backend that needs no gradient, or None where the kernels for pages do not suit it.

    k, v: (pages, kv_heads, page_size, head_dim or head_dim_v). page_table: (batch, pages of a member), int32, rows of any stride: its
    values are cut to the pages there are. problem: with page_size keys for each of a member's pages.
    """
    keys = (len(page_table), k.shape[1], page_table.shape[1] * k.shape[2])
    problem = problem._replace(k=Layout((*keys, k.shape[3]), k.stride()), v=Layout((*keys, v.shape[3]), v.stride()))
    if problem.seqlen_q > cuda_backend.FEW_QUERIES or not k.shape[0] * problem.seqlen_k or page_table.stride(-1) != 1:
        return None
    out, lse = empty_results(q, problem)
    pages = (page_table.data_ptr(), page_table.stride(0), len(k), k.shape[2])
    cuda_backend.run_split(q, k, v, out, lse, problem, pages)
    return out
