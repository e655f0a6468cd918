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

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
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

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int REGISTERS = LANES == 8 ? 8 : 16;  // for sums; x86 without AVX-512 has 16 in all
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct Step {
  int64_t kind, a, b, c;
  const float* factor;
  int64_t ins() const { return kind == LAST ? a * b : kind == FIRST ? a * c : a * b; }
  int64_t outs() const { return kind == LAST ? a * c : kind == FIRST ? b * c : a * b; }
  int64_t macs() const { return kind == SWAP ? 0 : a * b * c; }
};

// c (rows, outs) = a (rows, ins) @ factor (outs, ins).T + beta * c
void multiply(int64_t rows, int64_t outs, int64_t ins, const float* a, const float* factor, float* c, float beta) {
  const int m = outs, n = rows, k = ins, step = 1;
  const float one = 1;
  if (rows == 1) return sgemv_("T", &k, &m, &one, factor, &k, a, &step, &beta, c, &step);
  sgemm_("T", "N", &m, &n, &k, &one, factor, &k, a, &k, &beta, c, &m);
}

// ROWS rows and VECTORS vectors of a grid: sums stay in registers
template <int ROWS, int VECTORS>
inline void mix_tile(const float* factor, int64_t ins, const float* x, float* y, const float* bias, int64_t width) {
  Lanes sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v)
      sums[i][v] = bias ? *(const Lanes*)(bias + i * width + v * LANES) : Lanes{};
  for (int64_t j = 0; j < ins; ++j) {
    Lanes in[VECTORS];
    for (int v = 0; v < VECTORS; ++v) in[v] = *(const Lanes*)(x + j * width + v * LANES);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += factor[i * ins + j] * in[v];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) *(Lanes*)(y + i * width + v * LANES) = sums[i][v];
}

template <int ROWS>
void mix_rows(const float* factor, int64_t ins, const float* x, float* y, const float* bias, int64_t width) {
  constexpr int VECTORS = REGISTERS / ROWS;
  int64_t done = 0;
  for (; done + VECTORS * LANES <= width; done += VECTORS * LANES)
    mix_tile<ROWS, VECTORS>(factor, ins, x + done, y + done, bias ? bias + done : nullptr, width);
  for (; done + LANES <= width; done += LANES)
    mix_tile<ROWS, 1>(factor, ins, x + done, y + done, bias ? bias + done : nullptr, width);
  if (done == width) return;
  if (width >= LANES) {  // some columns twice
    done = width - LANES;
    mix_tile<ROWS, 1>(factor, ins, x + done, y + done, bias ? bias + done : nullptr, width);
    return;
  }
  for (int i = 0; i < ROWS; ++i)
    for (int64_t c = 0; c < width; ++c) {
      float sum = bias ? bias[i * width + c] : 0;
      for (int64_t j = 0; j < ins; ++j) sum += factor[i * ins + j] * x[j * width + c];
      y[i * width + c] = sum;
    }
}

template <int ROWS>
void mix_from(int64_t& row, int64_t outs, const float* factor, int64_t ins, const float* x, float* y, const float* bias,
              int64_t width) {
  if constexpr (ROWS <= REGISTERS / 2)
    for (; row + ROWS <= outs; row += ROWS)
      mix_rows<ROWS>(factor + row * ins, ins, x, y + row * width, bias ? bias + row * width : nullptr, width);
}

// y (outs, width) = factor (outs, ins) @ x (ins, width) + bias (outs, width)
void mix(const float* factor, int64_t ins, int64_t outs, const float* x, float* y, const float* bias, int64_t width) {
  int64_t row = 0;
  mix_from<8>(row, outs, factor, ins, x, y, bias, width);
  mix_from<4>(row, outs, factor, ins, x, y, bias, width);
  mix_from<2>(row, outs, factor, ins, x, y, bias, width);
  mix_from<1>(row, outs, factor, ins, x, y, bias, width);
}

template <size_t... I>
inline Lanes evens(Lanes a, Lanes b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

template <size_t... I>
inline Lanes odds(Lanes a, Lanes b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}

template <size_t... I>
inline Lanes zipped(Lanes a, Lanes b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * LANES)...);
}

template <size_t... I>
inline Lanes zipped_late(Lanes a, Lanes b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * LANES + LANES / 2)...);
}

constexpr auto each = std::make_index_sequence<LANES>{};

// (rows, SIDE) -> (SIDE, rows), SIDE a power of two: its bits move to the front, one in each round
template <int SIDE>
void swap_from(const float* x, float* y, int64_t rows) {
  int64_t i = 0;
  for (; i + LANES <= rows; i += LANES) {
    Lanes now[SIDE], next[SIDE];
    for (int v = 0; v < SIDE; ++v) now[v] = *(const Lanes*)(x + i * SIDE + v * LANES);
    for (int bits = 1; bits < SIDE; bits *= 2) {
      for (int v = 0; v < SIDE / 2; ++v) {
        next[v] = evens(now[2 * v], now[2 * v + 1], each);
        next[v + SIDE / 2] = odds(now[2 * v], now[2 * v + 1], each);
      }
      for (int v = 0; v < SIDE; ++v) now[v] = next[v];
    }
    for (int v = 0; v < SIDE; ++v) *(Lanes*)(y + v * rows + i) = now[v];
  }
  for (; i < rows; ++i)
    for (int v = 0; v < SIDE; ++v) y[v * rows + i] = x[i * SIDE + v];
}

// (SIDE, cols) -> (cols, SIDE): the same the other way round
template <int SIDE>
void swap_into(const float* x, float* y, int64_t cols) {
  int64_t i = 0;
  for (; i + LANES <= cols; i += LANES) {
    Lanes now[SIDE], next[SIDE];
    for (int v = 0; v < SIDE; ++v) now[v] = *(const Lanes*)(x + v * cols + i);
    for (int bits = 1; bits < SIDE; bits *= 2) {
      for (int v = 0; v < SIDE / 2; ++v) {
        next[2 * v] = zipped(now[v], now[v + SIDE / 2], each);
        next[2 * v + 1] = zipped_late(now[v], now[v + SIDE / 2], each);
      }
      for (int v = 0; v < SIDE; ++v) now[v] = next[v];
    }
    for (int v = 0; v < SIDE; ++v) *(Lanes*)(y + i * SIDE + v * LANES) = now[v];
  }
  for (; i < cols; ++i)
    for (int v = 0; v < SIDE; ++v) y[i * SIDE + v] = x[v * cols + i];
}

// y (cols, rows) = x (rows, cols).T
void swap(const float* x, float* y, int64_t rows, int64_t cols) {
  switch (cols) {
    case 2: return swap_from<2>(x, y, rows);
    case 4: return swap_from<4>(x, y, rows);
    case 8: return swap_from<8>(x, y, rows);
    case 16: return swap_from<16>(x, y, rows);
  }
  switch (rows) {
    case 2: return swap_into<2>(x, y, cols);
    case 4: return swap_into<4>(x, y, cols);
    case 8: return swap_into<8>(x, y, cols);
    case 16: return swap_into<16>(x, y, cols);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) y[j * rows + i] = x[i * cols + j];
}

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
          mix(step.factor, step.a, step.b, x + t * ins, y + t * outs, bias, step.c);
        else
          swap(x + t * ins, y + t * outs, step.a, step.b);
    });
  }
}

at::Tensor chain(const at::Tensor& x, at::TensorList factors, at::IntArrayRef plan, const std::optional<at::Tensor>& bias) {
  std::vector<Step> steps;
  std::vector<at::Tensor> held{x.contiguous()};
  size_t used = 0;
  int64_t last = -1;
  for (size_t i = 0; i + 3 < plan.size(); i += 4) {
    Step step{plan[i], plan[i + 1], plan[i + 2], plan[i + 3], nullptr};
    TORCH_CHECK(step.kind >= LAST && step.kind <= SWAP, "compresskit: a step of kind ", step.kind);
    if (step.kind != SWAP) {
      TORCH_CHECK(used < factors.size(), "compresskit: more steps than factors");
      const at::Tensor& factor = factors[used++];
      const int64_t numbers = step.kind == LAST ? step.b * step.c : step.a * step.b;
      TORCH_CHECK(factor.numel() == numbers && factor.scalar_type() == at::kFloat && factor.is_cpu(),
                  "compresskit: a factor of ", numbers, " numbers in float32 is expected");
      held.push_back(factor.contiguous());
      step.factor = held.back().const_data_ptr<float>();
      last = steps.size();
    }
    TORCH_CHECK(steps.empty() || steps.back().outs() == step.ins(), "compresskit: steps that do not fit");
    steps.push_back(step);
  }
  TORCH_CHECK(last >= 0 && used == factors.size(), "compresskit: fewer steps than factors");
  const int64_t cols = steps.front().ins(), rows = steps.back().outs();
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_cpu() && x.dim() > 0 && x.size(-1) == cols,
              "compresskit: (..., ", cols, ") in float32 is expected");
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  at::Tensor y = at::empty(shape, x.options());
  const int64_t n = x.numel() / cols;
  const float* from = held.front().const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();

  std::vector<float> swapped;
  const float* added = nullptr;
  if (bias) {
    TORCH_CHECK(bias->numel() == rows && bias->scalar_type() == at::kFloat && bias->is_cpu(),
                "compresskit: a bias of ", rows, " numbers in float32 is expected");
    held.push_back(bias->contiguous());
    added = held.back().const_data_ptr<float>();
    for (size_t i = steps.size() - 1; i > size_t(last); --i) {
      std::vector<float> other(rows);
      swap(added, other.data(), steps[i].b, steps[i].a);
      swapped.swap(other);
      added = swapped.data();
    }
  }

  int64_t macs = 0, between = 1, groups = 1 << 20;
  for (size_t i = 0; i < steps.size(); ++i) {
    macs += steps[i].macs();
    if (i + 1 < steps.size()) between = std::max(between, steps[i].outs());
    if (steps[i].kind == LAST) groups = std::min(groups, steps[i].a);
  }
  const int64_t block = std::min(n, std::max({int64_t(1), BLOCK_NUMBERS / between, BLOCK_ROWS / groups}));
  const bool shared = macs >= LARGE && n * groups < FEW_ROWS * at::get_num_threads();
  const int64_t grain = shared ? n : std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, macs));

  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;
    if (steps.size() > 1 && scratch.size() < size_t(2 * block * between)) scratch.resize(2 * block * between);
    float* halves[2] = {scratch.data(), scratch.data() + block * between};
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

at::Tensor chain_meta(const at::Tensor& x, at::TensorList factors, at::IntArrayRef plan, const std::optional<at::Tensor>&) {
  const size_t i = plan.size() - 4;
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end());
  shape.back() = Step{plan[i], plan[i + 1], plan[i + 2], plan[i + 3], nullptr}.outs();
  return at::empty_symint(shape, x.options());
}

}  // namespace

TORCH_LIBRARY(compresskit, m) { m.def("chain(Tensor x, Tensor[] factors, int[] plan, Tensor? bias) -> Tensor"); }
TORCH_LIBRARY_IMPL(compresskit, CPU, m) { m.impl("chain", &chain); }
TORCH_LIBRARY_IMPL(compresskit, Meta, m) { m.impl("chain", &chain_meta); }
TORCH_LIBRARY_IMPL(compresskit, Autograd, m) { m.impl("chain", torch::CppFunction::makeFallthrough()); }
