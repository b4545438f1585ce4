// fused_attention._cpu: the kernels as Python functions on addresses and strides. It checks nothing; cpu_backend.py
// does.
#include "attention.h"
#include "cpu/arguments.h"
#include "cpu/kernels.h"
#include "cpu/layer_bindings.h"

namespace {

View view(const py::tuple& tensors, int index) {
  return ::view(py::reinterpret_borrow<py::tuple>(PyTuple_GetItem(tensors.ptr(), index)));
}

// See cpu_arguments.py, which makes these tuples.
AttentionParams params(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible,
                       const py::object& options) {
  AttentionParams p{};
  p.q = view(tensors, 0), p.k = view(tensors, 1), p.v = view(tensors, 2), p.out = view(tensors, 3);
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
  p.mask = view(given, 0), p.bias = view(given, 1);
  p.slopes = address<const void>(given, 2), p.slopes_batch = integer(given, 3), p.sinks = address<const void>(given, 4);
  p.softcap = number(given, 5);
  p.dropout_seed = address<const int64_t>(given, 6), p.dropout_threshold = integer(given, 7);
  p.dropout_scale = number(given, 8);
  return p;
}

const AttentionKernels& kernels_for(const AttentionParams& p) {
  return p.q.element == Element::kFloat64 ? *kernels().attention64 : kernels().attention;
}

void forward(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
             int threads) {
  const AttentionParams p = params(tensors, sizes, visible, options);
  const AttentionKernels& table = kernels_for(p);
  py::gil_scoped_release release;
  table.forward(p, threads);
}

void backward(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
              int threads, const py::tuple& gradients) {
  AttentionParams p = params(tensors, sizes, visible, options);
  p.dout = view(gradients, 0), p.dlse = address<const void>(gradients, 1);
  p.dq = view(gradients, 2), p.dk = view(gradients, 3), p.dv = view(gradients, 4), p.dbias = view(gradients, 5);
  p.dslopes = address<void>(gradients, 6), p.delta = address<void>(gradients, 7);
  const AttentionKernels& table = kernels_for(p);
  py::gil_scoped_release release;
  table.backward(p, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Kernels for CPUs, on addresses and strides; cpu_backend.py and layer_ops/cpu.py call them.";
  module.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  module.def("forward", &forward);
  module.def("backward", &backward);
  bind_layers(module);
}
