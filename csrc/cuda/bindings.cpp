// fused_attention._cuda: the kernels as Python functions on addresses and strides. It checks nothing; cuda_backend.py
// does.
#include <stdexcept>
#include <string>

#include "attention_arguments.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

#ifndef FUSED_ATTENTION_ARCHITECTURES
#define FUSED_ATTENTION_ARCHITECTURES \
  ""  // those that the kernels are compiled for, as build_tools/cuda_extension.py names them
#endif

namespace {

using Pass = int (*)(const AttentionParams&, Stream);

Pass by_type(Element element, Pass bfloat16, Pass float16, Pass float32) {
  return element == Element::kBFloat16 ? bfloat16 : element == Element::kFloat16 ? float16 : float32;
}

void check(int error, const char* kernel, const AttentionParams& p) {
  if (!error) return;
  const auto shape = [](int64_t heads, int64_t seqlen, int64_t dim) {
    return std::to_string(heads) + " heads of " + std::to_string(seqlen) + " rows of " + std::to_string(dim);
  };
  throw std::runtime_error(std::string("the CUDA kernel for the ") + kernel + " pass of a batch of " +
                           std::to_string(p.batch) + ", q " + shape(p.heads, p.seqlen_q, p.head_dim) + ", v " +
                           shape(p.kv_heads, p.seqlen_k, p.head_dim_v) + ", did not start: " + error_text(error));
}

// Makes the device current, with every kernel loaded there.
class ReadyDevice {
 public:
  explicit ReadyDevice(int device) : guard_(device) {
    if (const int error = load_kernels(device))
      throw std::runtime_error("the CUDA kernels, compiled for " FUSED_ATTENTION_ARCHITECTURES
                               ", can't be loaded on device " +
                               std::to_string(device) + ": " + error_text(error));
  }

 private:
  const DeviceGuard guard_;
};

py::tuple available() {
  const Devices found = devices();
  return py::make_tuple(found.count, found.error ? error_text(found.error) : "", found.driver, found.runtime);
}

py::list listed() {
  py::list found;
  for (const Kernel* kernel : kernels()) found.append(py::make_tuple(kernel->name, kernel->threads, kernel->shared));
  return found;
}

void forward(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
             int device, uintptr_t stream) {
  const AttentionParams p = attention_params(tensors, sizes, visible, options);
  const auto run = by_type(p.q.element, &forward_bfloat16, &forward_float16, &forward_float32);
  const ReadyDevice ready(device);
  check(run(p, reinterpret_cast<Stream>(stream)), "forward", p);
}

// split: how many keys a block reads, and where what they give goes. pages: as csrc/attention.h has them.
void forward_split(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible,
                   const py::object& options, const py::tuple& split, const py::tuple& pages, int device,
                   uintptr_t stream) {
  AttentionParams p = attention_params(tensors, sizes, visible, options);
  p.split_keys = integer(split, 0), p.split_out = address<float>(split, 1), p.split_lse = address<float>(split, 2);
  p.page_table = address<const int32_t>(pages, 0), p.page_table_batch = integer(pages, 1);
  p.pages = integer(pages, 2), p.page_size = integer(pages, 3);
  const auto run = by_type(p.q.element, &split_bfloat16, &split_float16, &split_float32);
  const ReadyDevice ready(device);
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
  p.dbias = tensor(6), p.dslopes = address<void>(gradients, 7), p.row_dslopes = address<void>(gradients, 8);
  const auto run = by_type(p.q.element, &backward_bfloat16, &backward_float16, &backward_float32);
  const ReadyDevice ready(device);
  check(run(p, reinterpret_cast<Stream>(stream)), "backward", p);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Kernels for NVIDIA GPUs, on addresses and strides; cuda_backend.py calls them.";
  module.def("available", &available, "How many devices there are, why none, and the versions of driver and runtime.");
  module.def("kernels", &listed, "Of every kernel its name, and a block's threads and bytes of shared memory.");
  module.def("forward", &forward);
  module.def("forward_split", &forward_split);
  module.def("backward", &backward);
  module.attr("ARCHITECTURES") = FUSED_ATTENTION_ARCHITECTURES;
}
