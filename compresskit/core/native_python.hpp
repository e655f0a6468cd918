// Calls from Python: the dispatcher of PyTorch takes 4 microseconds for a call, as long as the products of a small layer.
// Where it would do nothing but call our function, that is called right away; where not, by the dispatcher.

namespace direct {

// What may concern a tensor on the processor that takes no part in derivatives; all else is the dispatcher's
const c10::DispatchKeySet BARE({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                                c10::DispatchKey::BackendSelect});
const c10::DispatchKeySet PLAIN = BARE.add(c10::DispatchKey::AutocastCPU);  // autocast knows nothing of a chain

inline bool has_only(c10::DispatchKeySet known, c10::DispatchKeySet keys) {
  const auto here = c10::impl::tls_local_dispatch_key_set();
  return (((keys | here.included_) - here.excluded_).raw_repr() & ~known.raw_repr()) == 0;
}

// Whether a tensor is one, and no subclass, on the processor, and neither autocast nor anything else looks on
PyObject* is_bare(PyObject*, PyObject* x) {
  HANDLE_TH_ERRORS
  if (Py_TYPE(x) != reinterpret_cast<PyTypeObject*>(THPVariableClass)) Py_RETURN_FALSE;
  if (!has_only(BARE, THPVariable_Unpack(x).key_set())) Py_RETURN_FALSE;
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0)) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

const at::Tensor& tensor_of(PyObject* given) {
  TORCH_CHECK_TYPE(THPVariable_Check(given), "compresskit: a tensor is expected, got ", Py_TYPE(given)->tp_name);
  return THPVariable_Unpack(given);
}

at::Tensor called(const at::Tensor& x, at::TensorList factors, at::IntArrayRef plan, const std::optional<at::Tensor>& bias) {
  const pybind11::gil_scoped_release others_may_run;
  c10::DispatchKeySet keys = x.key_set();
  for (const at::Tensor& factor : factors) keys = keys | factor.key_set();
  if (bias) keys = keys | bias->key_set();
  if (!has_only(PLAIN, keys)) {
    static const auto by_dispatcher =
        c10::Dispatcher::singleton().findSchemaOrThrow("compresskit::chain", "").typed<decltype(chain)>();
    return by_dispatcher.call(x, factors, plan, bias);
  }
  RECORD_FUNCTION("compresskit::chain", std::vector<c10::IValue>({x}));
  return chain(x, factors, plan, bias);
}

// chain(x, factors, plan, bias) without derivatives; factors and plan are lists or tuples
PyObject* chain_now(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "compresskit: x, factors, plan and bias are expected");
  const auto items = [](PyObject* list, auto take) {
    TORCH_CHECK_TYPE(PyList_Check(list) || PyTuple_Check(list), "compresskit: factors and plan are lists or tuples");
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list); ++i) take(PySequence_Fast_GET_ITEM(list, i));
  };
  c10::SmallVector<at::Tensor, 4> factors;
  items(given[1], [&](PyObject* item) { factors.push_back(tensor_of(item)); });
  c10::SmallVector<int64_t, 24> plan;
  items(given[2], [&](PyObject* item) {
    const int64_t number = PyLong_AsLongLong(item);
    if (number == -1 && PyErr_Occurred()) throw python_error();
    plan.push_back(number);
  });
  const std::optional<at::Tensor> bias = given[3] == Py_None ? std::nullopt : std::optional<at::Tensor>(tensor_of(given[3]));
  return THPVariable_Wrap(called(tensor_of(given[0]), factors, plan, bias));
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"is_bare", is_bare, METH_O, nullptr},
    {"chain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(chain_now)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "compresskit_chain", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace direct
