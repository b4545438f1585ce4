// fused_attention._cpu: the kernels as Python functions on addresses and strides. It checks nothing; cpu_backend.py
// does.
#include "attention_arguments.h"
#include "cpu/arguments.h"
#include "cpu/call_facts.h"
#include "cpu/kernels.h"
#include "cpu/layer_bindings.h"
#include "cpu/parallel.h"

namespace {

View view(const py::tuple& tensors, int index) {
  return ::view(py::reinterpret_borrow<py::tuple>(PyTuple_GetItem(tensors.ptr(), index)));
}

const AttentionKernels& kernels_for(const AttentionParams& p) {
  return p.q.element == Element::kFloat64 ? *kernels().attention64 : kernels().attention;
}

// Whatever a call ends with, an arena gives back what it holds beyond the ordinary.
struct Trimmed {
  Arena& arena;
  ~Trimmed() { arena.trim(); }
};

void* lse_memory(Arena& arena, const AttentionParams& p) {
  const size_t rows = size_t(p.batch * p.heads * p.seqlen_q);
  if (p.q.element == Element::kFloat64) return arena.array<double>(rows);
  return arena.floats(rows);
}

void forward(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
             int threads) {
  const AttentionParams p = attention_params(tensors, sizes, visible, options);
  const AttentionKernels& table = kernels_for(p);
  py::gil_scoped_release release;
  table.forward(p, threads);
}

// forward of later calls that differ in nothing but their addresses. An lse that nobody asks for, whose address is 0,
// goes to scratch memory.
py::cpp_function prepare(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible,
                         const py::object& options) {
  const AttentionParams known = attention_params(tensors, sizes, visible, options);
  const AttentionKernels& table = kernels_for(known);
  return [known, &table](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads) {
    AttentionParams p = known;
    p.q.data = reinterpret_cast<char*>(q), p.k.data = reinterpret_cast<char*>(k);
    p.v.data = reinterpret_cast<char*>(v), p.out.data = reinterpret_cast<char*>(out);
    p.lse = reinterpret_cast<void*>(lse);
    py::gil_scoped_release release;
    static thread_local Arena scratch;
    const Trimmed after{scratch};
    if (!lse) p.lse = lse_memory(scratch, p);
    table.forward(p, threads);
  };
}

void backward(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
              int threads, const py::tuple& gradients) {
  AttentionParams p = attention_params(tensors, sizes, visible, options);
  p.dout = view(gradients, 0), p.dlse = address<const void>(gradients, 1);
  p.dq = view(gradients, 2), p.dk = view(gradients, 3), p.dv = view(gradients, 4), p.dbias = view(gradients, 5);
  p.dslopes = address<void>(gradients, 6), p.delta = address<void>(gradients, 7);
  const AttentionKernels& table = kernels_for(p);
  py::gil_scoped_release release;
  table.backward(p, threads);
}

bool decode_pages(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
                  int threads, const py::tuple& pages) {
  AttentionParams p = attention_params(tensors, sizes, visible, options);
  p.page_table = address<const int32_t>(pages, 0), p.page_table_batch = integer(pages, 1);
  p.pages = integer(pages, 2), p.page_size = integer(pages, 3);
  const AttentionKernels& table = kernels_for(p);
  py::gil_scoped_release release;
  return table.decode_pages(p, threads);
}

void weights(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& visible, const py::object& options,
             int threads, bool average) {
  AttentionParams p = attention_params(tensors, sizes, visible, options);
  p.head_dim_v = 0;
  const AttentionKernels& table = kernels_for(p);
  py::gil_scoped_release release;
  table.weights(p, average, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Kernels for CPUs, on addresses and strides; cpu_backend.py and layer_ops/cpu.py call them.";
  module.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  module.def("forward", &forward);
  module.def("prepare", &prepare);
  module.def("call_facts", &call_facts::reader);
  module.def("backward", &backward);
  module.def("weights", &weights);
  module.def("decode_pages", &decode_pages);
  module.def("multiply_adds", [](int64_t steps) { return kernels().multiply_adds(steps); });
  bind_layers(module);
}
