// Training: a node of PyTorch's graph that keeps what came in and the factors, and computes the rest again on its way back.

// What may concern a tensor on the processor in a call and on the way back; all else is the dispatcher's
const c10::DispatchKeySet BARE({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                                c10::DispatchKey::BackendSelect});
const c10::DispatchKeySet PLAIN = BARE.add(c10::DispatchKey::AutocastCPU);  // autocast knows nothing of a chain

inline bool has_only(c10::DispatchKeySet known, c10::DispatchKeySet keys) {
  const auto here = c10::impl::tls_local_dispatch_key_set();
  return (((keys | here.included_) - here.excluded_).raw_repr() & ~known.raw_repr()) == 0;
}

inline bool derives_forward() { return bool(torch::autograd::ForwardADLevel::try_get_by_idx(0)); }

inline c10::DispatchKeySet keys_of(at::TensorList tensors) {
  c10::DispatchKeySet keys;
  for (const at::Tensor& tensor : tensors) keys = keys | tensor.key_set();
  return keys;
}

// The chain, called right away where the dispatcher would do nothing else
at::Tensor called(const at::Tensor& x, at::TensorList factors, at::IntArrayRef plan, const std::optional<at::Tensor>& bias) {
  if (!has_only(PLAIN, x.key_set() | keys_of(factors) | (bias ? bias->key_set() : c10::DispatchKeySet()))) {
    static const auto by_dispatcher =
        c10::Dispatcher::singleton().findSchemaOrThrow("compresskit::chain", "").typed<decltype(chain)>();
    return by_dispatcher.call(x, factors, plan, bias);
  }
  RECORD_FUNCTION("compresskit::chain", std::vector<c10::IValue>({x}));
  return chain(x, factors, plan, bias);
}

// The chain by PyTorch's own operations, for derivatives of derivatives and for all that looks on
at::Tensor composed(at::Tensor x, at::TensorList factors, at::IntArrayRef plan, const std::optional<at::Tensor>& bias) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  const int64_t n = shape.back() ? x.numel() / shape.back() : 0;
  size_t used = 0;
  for (size_t i = 0; i + 3 < plan.size(); i += 4) {
    const int64_t a = plan[i + 1], b = plan[i + 2], c = plan[i + 3];
    if (plan[i] == LAST) {
      x = x.reshape({n * a, b}).matmul(factors[used++].reshape({c, b}).t());
      shape.back() = a * c;
    } else if (plan[i] == FIRST) {
      x = factors[used++].reshape({b, a}).matmul(x.reshape({n, a, c}));
      shape.back() = b * c;
    } else {
      x = x.reshape({n, a, b}).transpose(1, 2);
    }
  }
  x = x.reshape(shape);
  return bias ? x + *bias : x;
}

inline at::Tensor as(at::ScalarType type, const at::Tensor& given) {
  return given.scalar_type() == type ? given : given.to(type);  // the dispatcher takes longer to find that out
}

inline std::optional<at::Tensor> as(at::ScalarType type, const std::optional<at::Tensor>& given) {
  return given ? std::optional<at::Tensor>(as(type, *given)) : std::nullopt;
}

struct CompresskitChain : torch::autograd::Function<CompresskitChain> {
  using Tensors = torch::autograd::variable_list;
  using Context = torch::autograd::AutogradContext;

  // `back` and `order` are the plan of the way back and, of each factor in it, its place among the factors
  static at::Tensor forward(Context* context, const at::Tensor& x, at::TensorList factors,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef plan, at::IntArrayRef back,
                            at::IntArrayRef order) {
    TORCH_CHECK(order.size() == factors.size(), "compresskit: the way back has other factors");
    for (const int64_t place : order)
      TORCH_CHECK(place >= 0 && place < int64_t(factors.size()), "compresskit: no factor ", place);
    Tensors saved{x};
    saved.insert(saved.end(), factors.begin(), factors.end());
    if (bias) saved.push_back(*bias);
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    context->saved_data["back"] = back;
    context->saved_data["order"] = order;

    if (!at::autocast::is_autocast_enabled(at::kCPU)) return called(x, factors, plan, bias);
    std::vector<at::Tensor> narrowed;  // under autocast the parameters of a layer are wider than it is
    for (const at::Tensor& factor : factors) narrowed.push_back(as(x.scalar_type(), factor));
    return called(x, narrowed, plan, as(x.scalar_type(), bias));
  }

  static Tensors backward(Context* context, const Tensors& upstream) {
    const Tensors saved = context->get_saved_variables();
    const std::vector<int64_t> back = context->saved_data["back"].toIntVector();
    const std::vector<int64_t> order = context->saved_data["order"].toIntVector();
    const size_t count = order.size(), biased = saved.size() > count + 1;
    const at::Tensor &grad = upstream[0], &x = saved[0];
    const at::ScalarType type = x.scalar_type();
    Tensors given(count + 5);
    if (!grad.defined()) return given;

    std::vector<at::Tensor> turned;
    const bool again = at::GradMode::is_enabled();
    const bool plain = grad.scalar_type() == type && has_only(PLAIN, keys_of(saved) | grad.key_set()) && !derives_forward();
    if (again || !plain) {
      const at::AutoGradMode on(true);
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      for (const int64_t place : order) turned.push_back(as(type, saved[1 + place]));
      const at::Tensor y = composed(x, turned, back, biased ? std::optional<at::Tensor>(as(type, saved.back())) : std::nullopt);
      Tensors wanted;
      for (size_t i = 0; i < saved.size(); ++i)
        if (context->needs_input_grad(i)) wanted.push_back(saved[i]);
      const Tensors found = torch::autograd::grad({y}, wanted, {grad}, std::nullopt, again);
      for (size_t i = 0, k = 0; i < saved.size(); ++i)
        if (context->needs_input_grad(i)) given[i] = found[k++];
      return given;
    }
    RECORD_FUNCTION("compresskit::chain_backward", std::vector<c10::IValue>({grad}));
    at::DimVector needs{context->needs_input_grad(0), biased && context->needs_input_grad(count + 1)};
    for (const int64_t place : order) {
      turned.push_back(as(type, saved[1 + place]));
      needs.push_back(context->needs_input_grad(1 + place));
    }
    const std::vector<at::Tensor> found = chain_backward(grad, x, turned, back, needs);
    for (size_t i = 0; i < found.size(); ++i) {
      const size_t place = i == 0 ? 0 : i == 1 ? count + 1 : 1 + order[i - 2];
      if (needs[i]) given[place] = as(saved[place].scalar_type(), found[i]);
    }
    return given;
  }
};

// The chain of x, which PyTorch can differentiate
at::Tensor trained(const at::Tensor& x, at::TensorList factors, at::IntArrayRef plan, const std::optional<at::Tensor>& bias,
                   at::IntArrayRef back, at::IntArrayRef order) {
  return CompresskitChain::apply(x, factors, bias, plan, back, order);
}
