// What tells one call from another, as bytes that serve as a key: the values of its arguments, and of tensors all but
// their memory.
//
//   facts(arguments) -> bytes        None where an argument is no tensor of the known types, number, string, None, or
//                                    tuple of such
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <utility>
#include <vector>

namespace call_facts {

namespace py = pybind11;

// The beginnings of DLPack's structs, version 1, through which PyTorch shows a tensor to whom its headers are unknown:
// https://dmlc.github.io/dlpack/latest/c_api.html
struct TensorView {
  void* data;
  int32_t device_type, device_index, dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  void* of_owned_tensors[3];
  int (*view)(PyObject* tensor, TensorView*);  // 0, or -1 with an exception set
};

// Bytes on the stack: a key is short, and what does not fit is no key.
class Key {
 public:
  template <class T>
  void add(const T& value) {
    add(&value, sizeof(T));
  }
  void add(const void* from, size_t bytes) {
    fits_ = fits_ && bytes <= sizeof(bytes_) - used_;
    if (!fits_ || bytes == 0) return;
    std::memcpy(bytes_ + used_, from, bytes);
    used_ += bytes;
  }
  bool fits() const { return fits_; }
  py::bytes bytes() const { return {bytes_, used_}; }

 private:
  char bytes_[2048];
  size_t used_ = 0;
  bool fits_ = true;
};

class Reader {
 public:
  // Of tensors of exactly these types. Throws py::error_already_set where one has no such view.
  explicit Reader(const py::tuple& types) {
    for (const py::handle type : types) {
      const py::object capsule = type.attr("__dlpack_c_exchange_api__");
      const auto* exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!exchange) throw py::error_already_set();
      if (exchange->major != 1 || !exchange->view)
        throw py::attribute_error("PyTorch shows its tensors in another way");
      views_.emplace_back(reinterpret_cast<PyTypeObject*>(type.ptr()), exchange->view);
    }
  }

  py::object operator()(const py::tuple& arguments) const {
    Key key;
    if (!add_all(key, arguments.ptr()) || !key.fits()) return py::none();
    return key.bytes();
  }

 private:
  bool add_all(Key& key, PyObject* tuple) const {
    const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    key.add('('), key.add(count);
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!key.fits() || !add(key, PyTuple_GET_ITEM(tuple, i))) return false;
    return true;
  }

  // A kind, and the value: True equals 1, and checks tell them apart.
  bool add(Key& key, PyObject* x) const {
    if (x == Py_None || x == Py_True || x == Py_False) return key.add('='), key.add(x), true;
    for (const auto& [type, view] : views_)
      if (Py_TYPE(x) == type) return add_tensor(key, x, view);
    if (PyTuple_CheckExact(x)) return add_all(key, x);
    if (PyFloat_CheckExact(x)) return key.add('f'), key.add(PyFloat_AS_DOUBLE(x)), true;
    if (PyLong_CheckExact(x)) {
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
      return key.add('i'), key.add(value), !overflow;
    }
    if (!PyUnicode_CheckExact(x)) return false;
    Py_ssize_t count = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(x, &count);
    if (!text) return PyErr_Clear(), false;
    return key.add('s'), key.add(count), key.add(text, size_t(count)), true;
  }

  bool add_tensor(Key& key, PyObject* x, int (*view)(PyObject*, TensorView*)) const {
    // Of other devices some have no view, and the error that says so takes a millisecond.
    if (!is(x, on_cpu_) && !is(x, on_cuda_)) return false;
    TensorView seen{};
    if (view(x, &seen) != 0) return PyErr_Clear(), false;  // without strides, or without memory of its own
    const int32_t facts[] = {seen.device_type, seen.device_index, seen.type_code,       seen.type_bits,
                             seen.type_lanes,  seen.dims,         is(x, requires_grad_)};
    const size_t bytes = size_t(seen.dims) * sizeof(int64_t);
    key.add('t'), key.add(facts), key.add(seen.sizes, bytes), key.add(seen.strides, bytes);
    return true;
  }

  static bool is(PyObject* x, const py::str& property) {
    const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, property.ptr()));
    if (!value) throw py::error_already_set();
    return value.ptr() == Py_True;
  }

  std::vector<std::pair<PyTypeObject*, int (*)(PyObject*, TensorView*)>> views_;
  py::str requires_grad_{"requires_grad"}, on_cpu_{"is_cpu"}, on_cuda_{"is_cuda"};
};

inline py::cpp_function reader(const py::tuple& types) {
  return [read = Reader(types)](const py::tuple& arguments) { return read(arguments); };
}

}  // namespace call_facts
