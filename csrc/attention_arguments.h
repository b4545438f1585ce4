// An attention call as Python hands it over: tuples, which cpu_arguments.py makes.
#pragma once

#include "attention.h"
#include "cpu/arguments.h"

inline AttentionParams attention_params(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible,
                                        const py::object& options) {
  const auto tensor = [](const py::tuple& from, int index) {
    return view(py::reinterpret_borrow<py::tuple>(PyTuple_GetItem(from.ptr(), index)));
  };
  AttentionParams p{};
  p.q = tensor(tensors, 0), p.k = tensor(tensors, 1), p.v = tensor(tensors, 2), p.out = tensor(tensors, 3);
  p.lse = address<void>(tensors, 4), p.lse_batch = integer(tensors, 5), p.lse_head = integer(tensors, 6);
  p.batch = integer(sizes, 0), p.heads = integer(sizes, 1), p.kv_heads = integer(sizes, 2);
  p.seqlen_q = integer(sizes, 3), p.seqlen_k = integer(sizes, 4);
  p.head_dim = integer(sizes, 5), p.head_dim_v = integer(sizes, 6);
  p.cu_seqlens_q = address<const int64_t>(sizes, 7), p.cu_seqlens_k = address<const int64_t>(sizes, 8);
  p.scale = number(sizes, 9);
  p.window_left = integer(visible, 0), p.window_right = integer(visible, 1);
  p.starts = address<const int64_t>(visible, 2), p.ends = address<const int64_t>(visible, 3);
  p.kv_stride = integer(visible, 4);
  p.offsets = address<const int64_t>(visible, 5), p.offset = integer(visible, 6), p.has_offset = integer(visible, 7);
  if (options.is_none()) return p;
  const auto given = py::reinterpret_borrow<py::tuple>(options);
  p.mask = tensor(given, 0), p.bias = tensor(given, 1);
  p.slopes = address<const void>(given, 2), p.slopes_batch = integer(given, 3), p.sinks = address<const void>(given, 4);
  p.softcap = number(given, 5);
  p.dropout_seed = address<const int64_t>(given, 6), p.dropout_threshold = integer(given, 7);
  p.dropout_scale = number(given, 8);
  return p;
}
