// Calls from Python: the dispatcher of PyTorch takes 4 microseconds for a call, as long as the products of a small layer.
// Where it would do nothing but call our function, that is called right away; where not, by the dispatcher.

namespace direct {

// Whether a tensor is one, and no subclass, on the processor, and neither autocast nor anything else looks on
PyObject* is_bare(PyObject*, PyObject* x) {
  HANDLE_TH_ERRORS
  if (Py_TYPE(x) != reinterpret_cast<PyTypeObject*>(THPVariableClass)) Py_RETURN_FALSE;
  if (!has_only(BARE, THPVariable_Unpack(x).key_set())) Py_RETURN_FALSE;
  if (derives_forward()) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

const at::Tensor& tensor_of(PyObject* given) {
  TORCH_CHECK_TYPE(THPVariable_Check(given), "compresskit: a tensor is expected, got ", Py_TYPE(given)->tp_name);
  return THPVariable_Unpack(given);
}

template <typename Take>
void each(PyObject* list, Take take) {
  TORCH_CHECK_TYPE(PyList_Check(list) || PyTuple_Check(list), "compresskit: factors and plans are lists or tuples");
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list); ++i) take(PySequence_Fast_GET_ITEM(list, i));
}

using Numbers = c10::SmallVector<int64_t, 24>;
Numbers numbers(PyObject* list) {
  Numbers found;
  each(list, [&](PyObject* item) {
    const int64_t number = PyLong_AsLongLong(item);
    if (number == -1 && PyErr_Occurred()) throw python_error();
    found.push_back(number);
  });
  return found;
}

// chain(x, factors, plan, bias) without derivatives, or trained(x, factors, plan, bias, back, order) with them
template <bool training>
PyObject* chain_now(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == (training ? 6 : 4), "compresskit: x, factors, plan and bias are expected",
                   training ? ", and plan and factors of the way back" : "");
  const at::Tensor& x = tensor_of(given[0]);
  c10::SmallVector<at::Tensor, 4> factors;
  each(given[1], [&](PyObject* item) { factors.push_back(tensor_of(item)); });
  const Numbers plan = numbers(given[2]);
  const std::optional<at::Tensor> bias = given[3] == Py_None ? std::nullopt : std::optional<at::Tensor>(tensor_of(given[3]));
  const Numbers back = training ? numbers(given[4]) : Numbers(), order = training ? numbers(given[5]) : Numbers();
  at::Tensor y;
  {
    const pybind11::gil_scoped_release others_may_run;
    y = training ? trained(x, factors, plan, bias, back, order) : called(x, factors, plan, bias);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef functions[] = {
    {"is_bare", is_bare, METH_O, nullptr},
    {"chain", fast(chain_now<false>), METH_FASTCALL, nullptr},
    {"trained", fast(chain_now<true>), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "compresskit_chain", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace direct
