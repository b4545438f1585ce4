// fused_attention._cuda: the kernels as Python functions on addresses and strides. It checks nothing; cuda_backend.py
// does.
#include <stdexcept>
#include <string>

#include "attention_arguments.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace {

void check(int error, const char* kernel, const AttentionParams& p) {
  if (!error) return;
  const auto shape = [](int64_t heads, int64_t seqlen, int64_t dim) {
    return std::to_string(heads) + " heads of " + std::to_string(seqlen) + " rows of " + std::to_string(dim);
  };
  throw std::runtime_error(std::string("the CUDA kernel for the ") + kernel + " pass of a batch of " +
                           std::to_string(p.batch) + ", q " + shape(p.heads, p.seqlen_q, p.head_dim) + ", v " +
                           shape(p.kv_heads, p.seqlen_k, p.head_dim_v) + ", did not start: " + error_text(error));
}

py::tuple available() {
  const Devices found = devices();
  return py::make_tuple(found.count, found.error ? error_text(found.error) : "", found.driver, found.runtime);
}

void forward(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
             int device, uintptr_t stream) {
  const AttentionParams p = attention_params(tensors, sizes, visible, options);
  const auto run = p.q.element == Element::kBFloat16 ? &forward_bfloat16 : &forward_float16;
  const DeviceGuard guard(device);
  check(run(p, reinterpret_cast<Stream>(stream)), "forward", p);
}

void backward(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
              const py::tuple& gradients, int device, uintptr_t stream) {
  AttentionParams p = attention_params(tensors, sizes, visible, options);
  const auto tensor = [&](int index) {
    return view(py::reinterpret_borrow<py::tuple>(PyTuple_GetItem(gradients.ptr(), index)));
  };
  p.dout = tensor(0), p.dlse = address<const void>(gradients, 1);
  p.dq = tensor(2), p.dk = tensor(3), p.dv = tensor(4), p.delta = address<void>(gradients, 5);
  const auto run = p.q.element == Element::kBFloat16 ? &backward_bfloat16 : &backward_float16;
  const DeviceGuard guard(device);
  check(run(p, reinterpret_cast<Stream>(stream)), "backward", p);
}

void warmup(int device) {
  const DeviceGuard guard(device);
  for (const auto load : {&load_bfloat16, &load_float16})
    if (const int error = load()) throw std::runtime_error("a CUDA kernel could not be loaded: " + error_text(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Kernels for NVIDIA GPUs, on addresses and strides; cuda_backend.py calls them.";
  module.def("available", &available, "How many devices there are, why none, and the versions of driver and runtime.");
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("warmup", &warmup, "Loads every kernel on a device.");
}
