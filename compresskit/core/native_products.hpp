// What steps are made of, in float32 and by one thread: vectors, rows times factors, mixings and transpositions.

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int REGISTERS = LANES == 8 ? 8 : 16;  // for sums; x86 without AVX-512 has 16 in all
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

template <size_t... PART>
inline Four parts_added(Lanes sum, std::index_sequence<PART...>) {
  return (__builtin_shufflevector(sum, sum, 4 * PART, 4 * PART + 1, 4 * PART + 2, 4 * PART + 3) + ...);
}

// The sums of all numbers of four vectors, and of those of what they left
inline Four added_up(const Lanes (&sums)[4], const Four (&rest)[4]) {
  Four all[4];
  for (int i = 0; i < 4; ++i) all[i] = rest[i] + parts_added(sums[i], std::make_index_sequence<LANES / 4>());
  const Four first = __builtin_shufflevector(all[0], all[1], 0, 4, 1, 5) + __builtin_shufflevector(all[0], all[1], 2, 6, 3, 7);
  const Four last = __builtin_shufflevector(all[2], all[3], 0, 4, 1, 5) + __builtin_shufflevector(all[2], all[3], 2, 6, 3, 7);
  return __builtin_shufflevector(first, last, 0, 1, 4, 5) + __builtin_shufflevector(first, last, 2, 3, 6, 7);
}

// c (outs) = factor (outs, ins) @ a (ins) + beta * c, by this thread alone: a meeting of all would take longer
void multiply_row(int64_t outs, int64_t ins, const float* a, const float* factor, float* c, float beta) {
  for (int64_t o = 0; o < outs; o += 4) {
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = factor + std::min(o + i, outs - 1) * ins;
    Lanes sums[4] = {};
    Four rest[4] = {};
    int64_t j = 0;
    for (; j + LANES <= ins; j += LANES)
      for (int i = 0; i < 4; ++i) sums[i] += *(const Lanes*)(rows[i] + j) * *(const Lanes*)(a + j);
    for (; j + 4 <= ins; j += 4)
      for (int i = 0; i < 4; ++i) rest[i] += *(const Four*)(rows[i] + j) * *(const Four*)(a + j);
    for (; j < ins; ++j)
      for (int i = 0; i < 4; ++i) rest[i][0] += rows[i][j] * a[j];
    Four found = added_up(sums, rest);
    if (o + 4 <= outs) {
      if (beta != 0) found += beta * *(const Four*)(c + o);
      *(Four*)(c + o) = found;
    } else {
      for (int64_t i = 0; o + i < outs; ++i) c[o + i] = found[i] + (beta == 0 ? 0 : beta * c[o + i]);
    }
  }
}

// c (rows, outs) = a (rows, ins) @ factor (outs, ins).T + beta * c
void multiply(int64_t rows, int64_t outs, int64_t ins, const float* a, const float* factor, float* c, float beta) {
  const int m = outs, n = rows, k = ins, step = 1;
  const float one = 1;
  if (rows == 1 && outs * ins <= GRAIN) return multiply_row(outs, ins, a, factor, c, beta);
  if (rows == 1) return sgemv_("T", &k, &m, &one, factor, &k, a, &step, &beta, c, &step);
  sgemm_("T", "N", &m, &n, &k, &one, factor, &k, a, &k, &beta, c, &m);
}

// What is read and written: float32 as it is
inline Lanes lanes_at(const float* x) { return *(const Lanes*)x; }
inline float number_at(const float* x) { return *x; }

struct Written {
  float* y;
  Written from(int64_t at) const { return {y + at}; }
  void put(int64_t at, Lanes value) const { *(Lanes*)(y + at) = value; }
  void put(int64_t at, float value) const { y[at] = value; }
};

#if defined(COMPRESSKIT_HALF)
// ... or bfloat16, which is float32 within; what is written is rounded, and `added`, which may be null, added before
inline Lanes lanes_at(const at::BFloat16* x) {
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
}
inline float number_at(const at::BFloat16* x) { return *x; }

struct Rounded {
  at::BFloat16* y;
  const float* added;
  Rounded from(int64_t at) const { return {y + at, added ? added + at : nullptr}; }
  void put(int64_t at, Lanes value) const {
    if (added) value += *(const Lanes*)(added + at);
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)(y + at), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
    for (int l = 0; l < LANES; ++l) y[at + l] = at::BFloat16(value[l]);
#endif
  }
  void put(int64_t at, float value) const { y[at] = at::BFloat16(added ? value + added[at] : value); }
};
#endif

// ROWS rows and VECTORS vectors of a grid: sums stay in registers
template <int ROWS, int VECTORS, typename In, typename Out>
inline void mix_tile(const float* factor, int64_t ins, const In* x, Out y, const float* bias, int64_t width) {
  Lanes sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v)
      sums[i][v] = bias ? *(const Lanes*)(bias + i * width + v * LANES) : Lanes{};
  for (int64_t j = 0; j < ins; ++j) {
    Lanes in[VECTORS];
    for (int v = 0; v < VECTORS; ++v) in[v] = lanes_at(x + j * width + v * LANES);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += factor[i * ins + j] * in[v];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) y.put(i * width + v * LANES, sums[i][v]);
}

template <int ROWS, typename In, typename Out>
void mix_rows(const float* factor, int64_t ins, const In* x, Out y, const float* bias, int64_t width) {
  constexpr int VECTORS = REGISTERS / ROWS;
  int64_t done = 0;
  for (; done + VECTORS * LANES <= width; done += VECTORS * LANES)
    mix_tile<ROWS, VECTORS>(factor, ins, x + done, y.from(done), bias ? bias + done : nullptr, width);
  for (; done + LANES <= width; done += LANES)
    mix_tile<ROWS, 1>(factor, ins, x + done, y.from(done), bias ? bias + done : nullptr, width);
  if (done == width) return;
  if (width >= LANES) {  // some columns twice
    done = width - LANES;
    mix_tile<ROWS, 1>(factor, ins, x + done, y.from(done), bias ? bias + done : nullptr, width);
    return;
  }
  for (int i = 0; i < ROWS; ++i)
    for (int64_t c = 0; c < width; ++c) {
      float sum = bias ? bias[i * width + c] : 0;
      for (int64_t j = 0; j < ins; ++j) sum += factor[i * ins + j] * number_at(x + j * width + c);
      y.put(i * width + c, sum);
    }
}

template <int ROWS, typename In, typename Out>
void mix_from(int64_t& row, int64_t outs, const float* factor, int64_t ins, const In* x, Out y, const float* bias,
              int64_t width) {
  if constexpr (ROWS <= REGISTERS / 2)
    for (; row + ROWS <= outs; row += ROWS)
      mix_rows<ROWS>(factor + row * ins, ins, x, y.from(row * width), bias ? bias + row * width : nullptr, width);
}

// y (outs, width) = factor (outs, ins) @ x (ins, width) + bias (outs, width)
template <typename In, typename Out>
void mix(const float* factor, int64_t ins, int64_t outs, const In* x, Out y, const float* bias, int64_t width) {
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
template <int SIDE, typename In, typename Out>
void swap_from(const In* x, Out y, int64_t rows) {
  int64_t i = 0;
  for (; i + LANES <= rows; i += LANES) {
    Lanes now[SIDE], next[SIDE];
    for (int v = 0; v < SIDE; ++v) now[v] = lanes_at(x + i * SIDE + v * LANES);
    for (int bits = 1; bits < SIDE; bits *= 2) {
      for (int v = 0; v < SIDE / 2; ++v) {
        next[v] = evens(now[2 * v], now[2 * v + 1], each);
        next[v + SIDE / 2] = odds(now[2 * v], now[2 * v + 1], each);
      }
      for (int v = 0; v < SIDE; ++v) now[v] = next[v];
    }
    for (int v = 0; v < SIDE; ++v) y.put(v * rows + i, now[v]);
  }
  for (; i < rows; ++i)
    for (int v = 0; v < SIDE; ++v) y.put(v * rows + i, number_at(x + i * SIDE + v));
}

// SIDE vectors, the rows of a grid (SIDE, LANES), become its transpose (LANES, SIDE), one number behind the other
template <int SIDE>
inline void interleave(Lanes (&now)[SIDE]) {
  Lanes next[SIDE];
  for (int bits = 1; bits < SIDE; bits *= 2) {
    for (int v = 0; v < SIDE / 2; ++v) {
      next[2 * v] = zipped(now[v], now[v + SIDE / 2], each);
      next[2 * v + 1] = zipped_late(now[v], now[v + SIDE / 2], each);
    }
    for (int v = 0; v < SIDE; ++v) now[v] = next[v];
  }
}

// (SIDE, cols) -> (cols, SIDE): the same the other way round
template <int SIDE, typename In, typename Out>
void swap_into(const In* x, Out y, int64_t cols) {
  int64_t i = 0;
  for (; i + LANES <= cols; i += LANES) {
    Lanes now[SIDE];
    for (int v = 0; v < SIDE; ++v) now[v] = lanes_at(x + v * cols + i);
    interleave<SIDE>(now);
    for (int v = 0; v < SIDE; ++v) y.put(i * SIDE + v * LANES, now[v]);
  }
  for (; i < cols; ++i)
    for (int v = 0; v < SIDE; ++v) y.put(i * SIDE + v, number_at(x + v * cols + i));
}

// y (cols, rows) = x (rows, cols).T
template <typename In, typename Out>
void swap(const In* x, Out y, int64_t rows, int64_t cols) {
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
    for (int64_t j = 0; j < cols; ++j) y.put(j * rows + i, number_at(x + i * cols + j));
}

void swap(const float* x, float* y, int64_t rows, int64_t cols) { swap(x, Written{y}, rows, cols); }
