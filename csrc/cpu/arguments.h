// How Python hands over tensors: tuples of numbers, an address and strides.
#pragma once

#include <pybind11/pybind11.h>

#include "attention.h"
#include "layers.h"

namespace py = pybind11;

inline int64_t integer(const py::tuple& from, int index) {
  const long long value = PyLong_AsLongLong(PyTuple_GetItem(from.ptr(), index));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <class T>
T* address(const py::tuple& from, int index) {
  return reinterpret_cast<T*>(integer(from, index));
}

inline double number(const py::tuple& from, int index) {
  const double value = PyFloat_AsDouble(PyTuple_GetItem(from.ptr(), index));
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// (address, element, stride, stride, stride, stride), strides in elements
inline View view(const py::tuple& tensor) {
  const auto element = static_cast<Element>(integer(tensor, 1));
  const auto stride = [&](int index) { return integer(tensor, index) * bytes_of(element); };
  return {address<char>(tensor, 0), element, stride(2), stride(3), stride(4), stride(5)};
}

// (address, stride, stride, stride, stride)
inline FloatView float_view(const py::tuple& tensor) {
  return {address<float>(tensor, 0), integer(tensor, 1), integer(tensor, 2), integer(tensor, 3), integer(tensor, 4)};
}
