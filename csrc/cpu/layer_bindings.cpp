// The operations of a layer as Python functions on addresses and strides. They check nothing; layer_ops/cpu.py does.
#include "cpu/layer_bindings.h"

#include "cpu/arguments.h"
#include "cpu/kernels.h"

namespace {

// (address, stride of rows, stride of columns)
Matrix matrix(const py::tuple& tensor) { return {address<float>(tensor, 0), integer(tensor, 1), integer(tensor, 2)}; }

float* floats(int64_t address) { return reinterpret_cast<float*>(address); }

void product(const py::tuple& a, const py::tuple& b, const py::tuple& out, const py::tuple& residual,
             const py::tuple& sums, int64_t bias, const py::tuple& sizes, int64_t activation, bool gated, int threads) {
  const ProductParams p{
      matrix(a),    matrix(b),         matrix(out),       matrix(residual),  matrix(sums),
      floats(bias), integer(sizes, 0), integer(sizes, 1), integer(sizes, 2), static_cast<Activation>(activation),
      gated};
  const LayerKernels& table = kernels().layers;
  py::gil_scoped_release release;
  table.product(p, threads);
}

void add_norm(const py::tuple& x, const py::tuple& residual, const py::tuple& summed, const py::tuple& out,
              const py::tuple& vectors, const py::tuple& sizes, double eps, int threads) {
  NormParams p{};
  p.x = matrix(x), p.residual = matrix(residual), p.summed = matrix(summed), p.out = matrix(out);
  p.weight = address<float>(vectors, 0), p.bias = address<float>(vectors, 1);
  p.mean = address<float>(vectors, 2), p.rstd = address<float>(vectors, 3);
  p.rows = integer(sizes, 0), p.width = integer(sizes, 1), p.eps = static_cast<float>(eps);
  const LayerKernels& table = kernels().layers;
  py::gil_scoped_release release;
  table.add_norm(p, threads);
}

void add_norm_backward(const py::tuple& dout, const py::tuple& dsummed, const py::tuple& summed, const py::tuple& dx,
                       const py::tuple& dweight, const py::tuple& dbias, const py::tuple& vectors,
                       const py::tuple& sizes, int threads) {
  NormParams p{};
  p.dout = matrix(dout), p.dsummed = matrix(dsummed), p.summed = matrix(summed), p.dx = matrix(dx);
  p.dweight = matrix(dweight), p.dbias = matrix(dbias);
  p.weight = address<float>(vectors, 0), p.mean = address<float>(vectors, 1), p.rstd = address<float>(vectors, 2);
  p.rows = integer(sizes, 0), p.width = integer(sizes, 1);
  const LayerKernels& table = kernels().layers;
  py::gil_scoped_release release;
  table.add_norm_backward(p, threads);
}

void activate(const py::tuple& gate, const py::tuple& value, const py::tuple& out, const py::tuple& sizes,
              int64_t activation, int threads) {
  ActivationParams p{};
  p.gate = matrix(gate), p.value = matrix(value), p.out = matrix(out);
  p.rows = integer(sizes, 0), p.width = integer(sizes, 1), p.activation = static_cast<Activation>(activation);
  const LayerKernels& table = kernels().layers;
  py::gil_scoped_release release;
  table.activate(p, threads);
}

void activate_backward(const py::tuple& dout, const py::tuple& gate, const py::tuple& value, const py::tuple& dgate,
                       const py::tuple& dvalue, const py::tuple& sizes, int64_t activation, int threads) {
  ActivationParams p{};
  p.dout = matrix(dout), p.gate = matrix(gate), p.value = matrix(value);
  p.dgate = matrix(dgate), p.dvalue = matrix(dvalue);
  p.rows = integer(sizes, 0), p.width = integer(sizes, 1), p.activation = static_cast<Activation>(activation);
  const LayerKernels& table = kernels().layers;
  py::gil_scoped_release release;
  table.activate_backward(p, threads);
}

void sum_rows(const py::tuple& x, int64_t out, const py::tuple& sizes, int threads) {
  const Matrix rows = matrix(x);
  const int64_t count = integer(sizes, 0), width = integer(sizes, 1);
  const LayerKernels& table = kernels().layers;
  py::gil_scoped_release release;
  table.sum_rows(rows, floats(out), count, width, threads);
}

void rotate(const py::tuple& x, const py::tuple& out, const py::tuple& cos, const py::tuple& sin,
            const py::tuple& sizes, bool interleaved, bool inverse, int threads) {
  const RotationParams p{float_view(x),
                         float_view(out),
                         float_view(cos),
                         float_view(sin),
                         integer(sizes, 0),
                         integer(sizes, 1),
                         integer(sizes, 2),
                         integer(sizes, 3),
                         integer(sizes, 4),
                         interleaved,
                         inverse};
  const LayerKernels& table = kernels().layers;
  py::gil_scoped_release release;
  table.rotate(p, threads);
}

}  // namespace

void bind_layers(py::module_& module) {
  module.def("product", &product);
  module.def("add_norm", &add_norm);
  module.def("add_norm_backward", &add_norm_backward);
  module.def("activate", &activate);
  module.def("activate_backward", &activate_backward);
  module.def("sum_rows", &sum_rows);
  module.def("rotate", &rotate);
}
