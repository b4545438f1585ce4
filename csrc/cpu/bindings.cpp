// fused_attention._cpu: the kernels as Python functions on addresses and strides. It checks nothing; cpu_backend.py
// does.
#include <pybind11/pybind11.h>

#include "attention.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

int64_t integer(const py::tuple& from, int index) {
  const long long value = PyLong_AsLongLong(PyTuple_GetItem(from.ptr(), index));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <class T>
T* address(const py::tuple& from, int index) {
  return reinterpret_cast<T*>(integer(from, index));
}

// (address, stride, stride, stride, stride)
View view(const py::tuple& tensor) {
  return {address<void>(tensor, 0), integer(tensor, 1), integer(tensor, 2), integer(tensor, 3), integer(tensor, 4)};
}

AttentionParams params(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out, int64_t lse,
                       const py::tuple& sizes, const py::tuple& visible, double scale) {
  AttentionParams p{};
  p.q = view(q), p.k = view(k), p.v = view(v), p.out = view(out);
  p.lse = reinterpret_cast<float*>(lse);
  p.batch = integer(sizes, 0), p.heads = integer(sizes, 1), p.kv_heads = integer(sizes, 2);
  p.seqlen_q = integer(sizes, 3), p.seqlen_k = integer(sizes, 4);
  p.head_dim = integer(sizes, 5), p.head_dim_v = integer(sizes, 6);
  p.window_left = integer(visible, 0), p.window_right = integer(visible, 1);
  p.starts = address<const int64_t>(visible, 2), p.ends = address<const int64_t>(visible, 3);
  p.kv_stride = integer(visible, 4);
  p.offsets = address<const int64_t>(visible, 5), p.offset = integer(visible, 6), p.has_offset = integer(visible, 7);
  p.scale = static_cast<float>(scale);
  return p;
}

void forward(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out, int64_t lse,
             const py::tuple& sizes, const py::tuple& visible, double scale, int threads) {
  const AttentionParams p = params(q, k, v, out, lse, sizes, visible, scale);
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.forward(p, threads);
}

void backward(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out, int64_t lse,
              const py::tuple& sizes, const py::tuple& visible, double scale, int threads, const py::tuple& dout,
              int64_t dlse, const py::tuple& dq, const py::tuple& dk, const py::tuple& dv) {
  AttentionParams p = params(q, k, v, out, lse, sizes, visible, scale);
  p.dout = view(dout), p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  p.dlse = reinterpret_cast<const float*>(dlse);
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.backward(p, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Attention kernels for CPUs, on addresses and strides; fused_attention.cpu_backend calls them.";
  module.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  module.def("forward", &forward);
  module.def("backward", &backward);
}
