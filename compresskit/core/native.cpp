// Chains of small products on a processor, all steps for some tokens at a time, in one call and by each thread alone.
//
// PyTorch does the steps one after the other for all tokens: a call and a meeting of all threads for each, and what lies
// between them goes through memory. A plan has four numbers for each step:
//
//   0 groups ins outs   (groups * ins) -> (groups * outs): each group times the factor (outs, ins), transposed
//   1 ins outs width    (ins, width) -> (outs, width): the factor (outs, ins) times the grid
//   2 a b 0             (a, b) -> (b, a): the grid transposed; without a factor
//
// The bias goes to the last step with a factor, in the order of the output.

#if defined(COMPRESSKIT_PYTHON)
#include <torch/csrc/autograd/python_variable.h>

#include <torch/csrc/Exceptions.h>
#endif

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#if defined(__linux__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AMX_BF16__)
#define COMPRESSKIT_HALF
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
                       const float*, const int*, const float*, float*, const int*);
extern "C" void sgemv_(const char*, const int*, const int*, const float*, const float*, const int*, const float*, const int*,
                       const float*, float*, const int*);

namespace {

constexpr int64_t LAST = 0, FIRST = 1, SWAP = 2;
constexpr int64_t BLOCK_NUMBERS = 1 << 16;  // between two steps: a quarter of a megabyte, for the second-level cache
constexpr int64_t BLOCK_ROWS = 192;         // of a large product: with less, most of the time goes into packing its factor
constexpr int64_t GRAIN = 150000;           // multiply-adds that are worth another thread
constexpr int64_t LARGE = 600000;           // multiply-adds of a token from which threads share each step if there are ...
constexpr int64_t FEW_ROWS = 96;            // ... fewer rows for each: all would read all of the factors

constexpr int64_t SUMS = 1 << 22;           // numbers of gradients of factors that all threads together may add up

std::atomic<int64_t> computed[2];  // chains that were computed, and back: for tests

#include "native_products.hpp"

// Room that is kept for later calls, because fresh pages take long; from a cache line on, which the units need twice as
// long to read across
template <typename T>
class Room {
  std::vector<T> kept;

 public:
  T* of(int64_t numbers) {
    constexpr size_t LINE = 64;
    if (kept.size() < numbers + LINE / sizeof(T)) kept = std::vector<T>(numbers + LINE / sizeof(T));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(kept.data()) + LINE - 1) / LINE * LINE);
  }
};

struct Step {
  int64_t kind, a, b, c;
  const float* factor;
  int64_t ins() const { return kind == LAST ? a * b : kind == FIRST ? a * c : a * b; }
  int64_t outs() const { return kind == LAST ? a * c : kind == FIRST ? b * c : a * b; }
  int64_t macs() const { return kind == SWAP ? 0 : a * b * c; }
};

// One step of n tokens; by several threads where these are not yet at work
void run(const Step& step, int64_t n, const float* x, float* y, const float* bias) {
  const int64_t ins = step.ins(), outs = step.outs();
  if (step.kind == LAST) {
    if (bias)
      for (int64_t t = 0; t < n; ++t) std::memcpy(y + t * outs, bias, sizeof(float) * outs);
    multiply(n * step.a, step.c, step.b, x, step.factor, y, bias ? 1 : 0);
  } else {
    at::parallel_for(0, n, std::max<int64_t>(1, GRAIN / (ins + step.macs())), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        if (step.kind == FIRST)
          mix(step.factor, step.a, step.b, x + t * ins, Written{y + t * outs}, bias, step.c);
        else
          swap(x + t * ins, y + t * outs, step.a, step.b);
    });
  }
}

const char* name_of(at::ScalarType type) { return type == at::kFloat ? "float32" : "bfloat16"; }

// A plan with its factors, and what is needed to run it
struct Chain {
  std::vector<Step> steps;
  std::vector<at::Tensor> held;  // contiguous copies, or the tensors themselves
  std::vector<int64_t> factor_of;  // of each step its factor's number, -1 without one
  int64_t last = -1, cols, rows, macs = 0, groups = 1 << 20, numbers = 0;

  Chain(at::TensorList given, at::IntArrayRef plan, at::ScalarType type = at::kFloat) {
    size_t used = 0;
    for (size_t i = 0; i + 3 < plan.size(); i += 4) {
      Step step{plan[i], plan[i + 1], plan[i + 2], plan[i + 3], nullptr};
      TORCH_CHECK(step.kind >= LAST && step.kind <= SWAP, "compresskit: a step of kind ", step.kind);
      factor_of.push_back(-1);
      if (step.kind != SWAP) {
        TORCH_CHECK(used < given.size(), "compresskit: more steps than factors");
        factor_of.back() = used;
        const at::Tensor& factor = given[used++];
        const int64_t expected = step.kind == LAST ? step.b * step.c : step.a * step.b;
        TORCH_CHECK(factor.numel() == expected && factor.scalar_type() == type && factor.is_cpu(),
                    "compresskit: a factor of ", expected, " numbers in ", name_of(type), " on the processor is expected");
        held.push_back(factor.contiguous());
        if (type == at::kFloat) step.factor = held.back().const_data_ptr<float>();
        last = steps.size();
        macs += step.macs();
        numbers += expected;
        if (step.kind == LAST) groups = std::min(groups, step.a);
      }
      TORCH_CHECK(steps.empty() || steps.back().outs() == step.ins(), "compresskit: steps that do not fit");
      steps.push_back(step);
    }
    TORCH_CHECK(last >= 0 && used == given.size(), "compresskit: fewer steps than factors");
    cols = steps.front().ins();
    rows = steps.back().outs();
  }

  template <typename T = float>
  const T* take(const at::Tensor& x, int64_t width) {
    constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK(x.scalar_type() == type && x.is_cpu() && x.dim() > 0 && x.size(-1) == width, "compresskit: (..., ", width,
                ") in ", name_of(type), " on the processor is expected");
    held.push_back(x.contiguous());
    return held.back().const_data_ptr<T>();
  }

  // Whether threads share each step, and not the tokens
  bool shared(int64_t n) const { return macs >= LARGE && n * groups < FEW_ROWS * at::get_num_threads(); }

  int64_t block(int64_t n, int64_t between, int64_t most) const {
    return std::min(n, std::max({int64_t(1), most / between, BLOCK_ROWS / groups}));
  }
};

// What a way back has to find
struct Wanted {
  int64_t lowest, highest = 0;  // steps that the way back reaches, and the way there
  std::vector<int64_t> offsets;  // of the sums of each factor
  int64_t bias_at, size;

  Wanted(const Chain& made, at::TensorList factors, at::IntArrayRef needs) {
    TORCH_CHECK(needs.size() == factors.size() + 2, "compresskit: needs of input, bias and factors are expected");
    const int64_t count = made.steps.size();
    lowest = needs[0] ? 0 : count;
    for (int64_t i = 0; i < count; ++i)
      if (made.factor_of[i] >= 0 && needs[2 + made.factor_of[i]]) lowest = std::min(lowest, i), highest = i;
    offsets.assign(factors.size() + 1, 0);
    for (size_t f = 0; f < factors.size(); ++f) offsets[f + 1] = offsets[f] + (needs[2 + f] ? factors[f].numel() : 0);
    bias_at = offsets.back();
    size = bias_at + (needs[1] ? made.rows : 0);
  }

  // Sets a thread's own sums to zero but for those of factors that products of the last axis write first
  void clear(const Chain& made, float* own) const {
    for (size_t i = 0; i < made.steps.size(); ++i)
      if (const int64_t f = made.factor_of[i]; f >= 0 && made.steps[i].kind != LAST)
        std::fill(own + offsets[f], own + offsets[f + 1], 0.0f);
    std::fill(own + bias_at, own + size, 0.0f);
  }

  // Gradients of input, bias and factors, from the sums (threads, size) of threads that had any to add up; those that are
  // not needed are empty
  std::vector<at::Tensor> gradients(const at::Tensor& x_grad, at::Tensor sums, const std::vector<char>& added,
                                    at::TensorList factors, at::IntArrayRef needs) const {
    for (size_t thread = 0; thread < added.size(); ++thread)
      if (!added[thread]) sums.select(0, thread).zero_();
    sums = sums.size(0) > 1 ? sums.sum(0) : sums.view({size});
    const at::Tensor none = at::empty({0}, sums.options());
    std::vector<at::Tensor> found{x_grad, needs[1] ? sums.narrow(0, bias_at, size - bias_at) : none};
    for (size_t f = 0; f < factors.size(); ++f)
      found.push_back(needs[2 + f] ? sums.narrow(0, offsets[f], factors[f].numel()).view(factors[f].sizes()) : none);
    return found;
  }
};

#include "native_tiles.hpp"
#include "native_half.hpp"

at::Tensor chain(const at::Tensor& x, at::TensorList factors, at::IntArrayRef plan, const std::optional<at::Tensor>& bias) {
  ++computed[0];
#if defined(COMPRESSKIT_HALF)
  if (x.scalar_type() == at::kBFloat16) {
    half::check_units();
    Chain made(factors, plan, at::kBFloat16);
    return half::chain(made, x, bias);
  }
#endif
  Chain made(factors, plan);
  const std::vector<Step>& steps = made.steps;
  const int64_t cols = made.cols, rows = made.rows, last = made.last;
  const float* from = made.take(x, cols);
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  at::Tensor y = at::empty(shape, x.options());
  const int64_t n = x.numel() / cols;
  float* to = y.mutable_data_ptr<float>();

  std::vector<float> swapped;
  const float* added = nullptr;
  if (bias) {
    added = made.take(*bias, rows);
    for (size_t i = steps.size() - 1; i > size_t(last); --i) {
      std::vector<float> other(rows);
      swap(added, other.data(), steps[i].b, steps[i].a);
      swapped.swap(other);
      added = swapped.data();
    }
  }
  int64_t between = 1;
  for (size_t i = 0; i + 1 < steps.size(); ++i) between = std::max(between, steps[i].outs());
  const int64_t block = made.block(n, between, BLOCK_NUMBERS);
  const int64_t grain = made.shared(n) ? n : std::max<int64_t>(1, GRAIN / made.macs);

  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    thread_local Room<float> room;
    float* scratch = room.of(steps.size() > 1 ? 2 * block * between : 0);
    float* halves[2] = {scratch, scratch + block * between};
    for (int64_t t = begin; t < end; t += block) {
      const int64_t count = std::min(block, end - t);
      const float* in = from + t * cols;
      for (size_t i = 0; i < steps.size(); ++i) {
        float* out = i + 1 == steps.size() ? to + t * rows : halves[i % 2];
        run(steps[i], count, in, out, int64_t(i) == last ? added : nullptr);
        in = out;
      }
    }
  });
  return y;
}

// sums (outs, ins) += sum over n tokens of g (outs, width) @ x (ins, width).T, for ROWS x COLS of the sums
template <int ROWS, int COLS>
void contract_tile(int64_t n, const float* g, int64_t g_step, const float* x, int64_t x_step, int64_t width, float* sums,
                   int64_t ins) {
  Lanes total[ROWS][COLS] = {};
  float rest[ROWS][COLS] = {};
  for (int64_t t = 0; t < n; ++t, g += g_step, x += x_step) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
      Lanes right[COLS];
      for (int j = 0; j < COLS; ++j) right[j] = *(const Lanes*)(x + j * width + c);
      for (int i = 0; i < ROWS; ++i) {
        const Lanes left = *(const Lanes*)(g + i * width + c);
        for (int j = 0; j < COLS; ++j) total[i][j] += left * right[j];
      }
    }
    for (; c < width; ++c)
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLS; ++j) rest[i][j] += g[i * width + c] * x[j * width + c];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLS; ++j) {
      float sum = rest[i][j];
      for (int l = 0; l < LANES; ++l) sum += total[i][j][l];
      sums[i * ins + j] += sum;
    }
}

template <int ROWS>
void contract_rows(int64_t n, const float* g, int64_t g_step, const float* x, int64_t x_step, int64_t width, float* sums,
                   int64_t ins) {
  int64_t j = 0;
  for (; j + 4 <= ins; j += 4) contract_tile<ROWS, 4>(n, g, g_step, x + j * width, x_step, width, sums + j, ins);
  for (; j + 2 <= ins; j += 2) contract_tile<ROWS, 2>(n, g, g_step, x + j * width, x_step, width, sums + j, ins);
  for (; j < ins; ++j) contract_tile<ROWS, 1>(n, g, g_step, x + j * width, x_step, width, sums + j, ins);
}

// Gradient of the factor of a step: sums += what n tokens give, or, the first time, products of the last axis alone
void add_factor_gradient(const Step& step, int64_t n, const float* g, const float* x, float* sums, bool first) {
  if (step.kind == LAST) {
    const int m = step.b, k = n * step.a, o = step.c;
    const float one = 1, old = first ? 0 : 1;
    sgemm_("N", "T", &m, &o, &k, &one, x, &m, g, &o, &old, sums, &m);
    return;
  }
  const int64_t ins = step.a, outs = step.b, width = step.c;
  constexpr int ROWS = REGISTERS / 4;
  int64_t i = 0;
  for (; i + ROWS <= outs; i += ROWS)
    contract_rows<ROWS>(n, g + i * width, outs * width, x, ins * width, width, sums + i * ins, ins);
  const auto rest = [&](auto contract) { contract(n, g + i * width, outs * width, x, ins * width, width, sums + i * ins, ins); };
  if (outs - i == 3) return rest(contract_rows<3>);
  if (outs - i == 2) return rest(contract_rows<2>);
  if (outs - i == 1) return rest(contract_rows<1>);
}

// Gradient of what came into a step; `turned` is the factor transposed, of steps of the first axis
void input_gradient(const Step& step, int64_t n, const float* g, const float* turned, float* x) {
  if (step.kind == LAST) {
    const int m = step.b, k = n * step.a, o = step.c;
    const float one = 1, zero = 0;
    sgemm_("N", "N", &m, &k, &o, &one, step.factor, &m, g, &o, &zero, x, &m);
  } else if (step.kind == FIRST) {
    run(Step{FIRST, step.b, step.a, step.c, turned}, n, g, x, nullptr);
  } else {
    run(Step{SWAP, step.b, step.a, 0, nullptr}, n, g, x, nullptr);
  }
}

#include "native_half_backward.hpp"
#include "native_attention.hpp"

// Gradients of input, bias and factors; those that are not needed are empty, and those of bias and factors in float32
std::vector<at::Tensor> chain_backward(const at::Tensor& grad, const at::Tensor& x, at::TensorList factors,
                                       at::IntArrayRef plan, at::IntArrayRef needs) {
  ++computed[1];
#if defined(COMPRESSKIT_HALF)
  if (x.scalar_type() == at::kBFloat16) {
    half::check_units();
    Chain made(factors, plan, at::kBFloat16);
    return half::chain_backward(made, grad, x, factors, needs);
  }
#endif
  Chain made(factors, plan);
  const std::vector<Step>& steps = made.steps;
  const int64_t count_steps = steps.size(), cols = made.cols, rows = made.rows;
  const float *from = made.take(x, cols), *upstream = made.take(grad, rows);
  const int64_t n = x.numel() / cols;
  TORCH_CHECK(grad.numel() == n * rows, "compresskit: a gradient of ", n, " tokens is expected");
  const int threads = at::get_num_threads();

  const Wanted wanted(made, factors, needs);
  const int64_t lowest = wanted.lowest, highest = wanted.highest;
  std::vector<int64_t> places(count_steps + 1, 0);  // of what comes into each step, for one token
  int64_t between = 0, most = 1;
  for (int64_t i = 0; i < count_steps; ++i) {
    places[i] = between;
    if (i > 0 && i <= highest) between += steps[i].ins();
    if (i > 0) most = std::max(most, steps[i].ins());
  }
  const bool shared = n * made.groups < FEW_ROWS * threads || made.numbers * threads > SUMS;
  const int64_t block = made.block(n, std::max<int64_t>(1, between + 2 * most), shared ? 16 * BLOCK_NUMBERS : 2 * BLOCK_NUMBERS);
  const int64_t grain = shared ? std::max<int64_t>(1, n) : std::max<int64_t>(1, GRAIN / (3 * made.macs));

  std::vector<std::vector<float>> turned(count_steps);
  for (int64_t i = 0; i < count_steps; ++i)
    if (steps[i].kind == FIRST) {
      turned[i].resize(steps[i].a * steps[i].b);
      swap(steps[i].factor, turned[i].data(), steps[i].b, steps[i].a);
    }
  at::Tensor x_grad = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  float* to = x_grad.mutable_data_ptr<float>();
  const int sums_of = shared || n <= grain ? 1 : threads;
  at::Tensor sums = at::empty({sums_of, wanted.size}, x.options());
  float* all = sums.mutable_data_ptr<float>();
  std::vector<char> added(sums_of);

  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const int thread = sums_of == 1 ? 0 : at::get_thread_num();
    float* own = all + thread * wanted.size;
    added[thread] = true;
    wanted.clear(made, own);
    thread_local Room<float> room;
    float* scratch = room.of(block * (between + 2 * most));
    float* halves[2] = {scratch + block * between, scratch + block * (between + most)};
    for (int64_t t = begin; t < end; t += block) {
      const int64_t count = std::min(block, end - t);
      const auto into = [&](int64_t i) { return i == 0 ? from + t * cols : scratch + block * places[i]; };
      for (int64_t i = 0; i < highest; ++i)
        run(steps[i], count, into(i), scratch + block * places[i + 1], nullptr);
      const float* g = upstream + t * rows;
      if (needs[1])
        for (int64_t k = 0; k < count; ++k)
          for (int64_t c = 0; c < rows; ++c) own[wanted.bias_at + c] += g[k * rows + c];
      for (int64_t i = count_steps - 1; i >= lowest; --i) {
        const int64_t factor = made.factor_of[i];
        if (factor >= 0 && needs[2 + factor])
          add_factor_gradient(steps[i], count, g, into(i), own + wanted.offsets[factor], t == begin);
        if (i == lowest && !(needs[0] && i == 0)) break;
        float* out = i == 0 ? to + t * cols : halves[i % 2];
        input_gradient(steps[i], count, g, turned[i].data(), out);
        g = out;
      }
    }
  });
  return wanted.gradients(x_grad, sums, added, factors, needs);
}

// Whether bfloat16 is for the kernel, too
bool half_products() {
#if defined(COMPRESSKIT_HALF)
  return half::may_use_units();
#else
  return false;
#endif
}

#include "native_training.hpp"

#if defined(COMPRESSKIT_PYTHON)
#include "native_python.hpp"
#endif

}  // namespace

#if defined(COMPRESSKIT_PYTHON)
PyMODINIT_FUNC PyInit_compresskit_chain() { return PyModule_Create(&direct::module); }
#endif
TORCH_LIBRARY(compresskit, m) {
  m.def("chain(Tensor x, Tensor[] factors, int[] plan, Tensor? bias) -> Tensor");
  m.def("trained(Tensor x, Tensor[] factors, int[] plan, Tensor? bias, int[] back, int[] order) -> Tensor");
  m.def("half_products() -> bool");
  m.def("computed() -> int[]");
#if defined(COMPRESSKIT_HALF)
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor logs, float scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "score_squares(Tensor query, Tensor key, Tensor other_query, Tensor other_key, Tensor pairs) -> (Tensor, Tensor, Tensor)");
#endif
  m.def("chain_backward(Tensor grad, Tensor x, Tensor[] factors, int[] plan, int[] needs) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(compresskit, CompositeExplicitAutograd, m) {
  m.impl("half_products", &half_products);
  m.impl("computed", [] { return std::vector<int64_t>{computed[0], computed[1]}; });
}
TORCH_LIBRARY_IMPL(compresskit, CPU, m) {
  m.impl("chain", &chain);
  m.impl("chain_backward", &chain_backward);
#if defined(COMPRESSKIT_HALF)
  m.impl("attention", &half::attention);
  m.impl("attention_backward", &half::attention_backward);
  m.impl("score_squares", &half::score_squares);
#endif
}
TORCH_LIBRARY_IMPL(compresskit, Autograd, m) {
  m.impl("chain", torch::CppFunction::makeFallthrough());
  m.impl("chain_backward", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(compresskit, CompositeImplicitAutograd, m) {
  m.impl("trained", &trained);
}
