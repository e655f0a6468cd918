// Attention of a training step, and the loss of its scores, in bfloat16 for native.cpp: all of one head by one thread, by the
// matrix units, with sums, softmax and differences in float32. Nothing of the size time x time leaves the caches.

#if defined(COMPRESSKIT_HALF)

namespace half {

constexpr int64_t QUERIES = 64;  // whose scores are in the caches at a time
constexpr int64_t HEADS_GRAIN = 1 << 20;  // multiply-adds that are worth another thread

// (batch, heads, time, size) in bfloat16, as it lies
struct Heads {
  Half* at = nullptr;
  int64_t batch, heads, time, size, by_batch, by_head, by_time;

  explicit Heads(const at::Tensor& x) {
    TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kBFloat16 && x.dim() == 4 && x.size(3) % 2 == 0 && x.size(3) > 0 &&
                    (x.stride(3) == 1),
                "compresskit: (batch, heads, time, size) in bfloat16 on the processor is expected, of even size and in a row");
    batch = x.size(0), heads = x.size(1), time = x.size(2), size = x.size(3);
    by_batch = x.stride(0), by_head = x.stride(1), by_time = x.stride(2);
    at = const_cast<Half*>(x.const_data_ptr<Half>());
  }

  void check_like(const Heads& other, bool sizes) const {
    TORCH_CHECK(batch == other.batch && heads == other.heads && time == other.time && (!sizes || size == other.size),
                "compresskit: queries, keys and values of one shape are expected");
  }

  Half* of(int64_t one, int64_t head, int64_t row = 0) const { return at + one * by_batch + head * by_head + row * by_time; }
};

// One more of the same shape, in memory as (batch, time, heads, size)
inline at::Tensor beside(const Heads& x, const at::Tensor& like) {
  return at::empty({x.batch, x.time, x.heads, x.size}, like.options()).transpose(1, 2);
}

inline int64_t padded(int64_t count) { return (count + DEPTH - 1) / DEPTH * DEPTH; }

// Which of 16 numbers from `at` on are below `end`
inline __mmask16 until(int64_t end, int64_t at) { return end - at >= TILE ? 0xffff : end > at ? (1 << (end - at)) - 1 : 0; }

inline void put_rounded(Half* y, int64_t end, int64_t at, __m512 value) {
  _mm256_mask_storeu_epi16(y + at, until(end, at), (__m256i)_mm512_cvtneps_pbh(value));
}

// y (cols, rows) = x (rows, cols).T, both sides multiples of 16 but for rows: rows behind the last are zeros
inline void turn(const Half* x, int64_t x_step, int64_t rows, int64_t cols, Half* y, int64_t y_step) {
  for (int64_t r = 0; r < y_step; r += TILE)
    for (int64_t c = 0; c < cols; c += TILE) {
      Lanes now[TILE];
      for (int v = 0; v < TILE; ++v) {
        const __mmask16 some = r + v < rows ? until(cols, c) : 0;
        now[v] = (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x + (r + v) * x_step + c)), 16);
      }
      interleave<TILE>(now);
      for (int v = 0; v < TILE && c + v < cols; ++v) Rounded{y + (c + v) * y_step + r, nullptr}.put(0, now[v]);
    }
}

// y (rows, cols), rounded, = factor * x (cols, rows).T, of which `x_step` is a multiple of 16
inline void turn_back(const float* x, int64_t x_step, int64_t rows, int64_t cols, float factor, Half* y, int64_t y_step) {
  for (int64_t r = 0; r < rows; r += TILE)
    for (int64_t c = 0; c < cols; c += TILE) {
      Lanes now[TILE];
      for (int v = 0; v < TILE; ++v) now[v] = c + v < cols ? *(const Lanes*)(x + (c + v) * x_step + r) : Lanes{};
      interleave<TILE>(now);
      for (int v = 0; v < TILE && r + v < rows; ++v) put_rounded(y + (r + v) * y_step, cols, c, (__m512)now[v] * factor);
    }
}

// e^x to float32's precision less two bits, for x up to 88; 0 below -87, because numbers that are next to nothing take long
inline __m512 exponential(__m512 x) {
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87), _CMP_NLT_UQ);  // NaN stays
  const __m512 scaled = _mm512_maskz_mov_ps(some, x) * 1.44269504f;
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = scaled - whole;
  __m512 sum = part * 1.5403530e-4f + 1.3333558e-3f;
  sum = sum * part + 9.6181291e-3f;
  sum = sum * part + 5.5504109e-2f;
  sum = sum * part + 2.4022651e-1f;
  sum = sum * part + 6.9314718e-1f;
  sum = sum * part + 1.0f;
  return _mm512_maskz_scalef_ps(some, sum, whole);
}

// What is added to scores: nothing, or of each pair a number, or, of bool, -infinity where it is false
struct Mask {
  const void* at = nullptr;
  at::ScalarType type = at::kFloat;
  int64_t by_batch = 0, by_head = 0, by_row = 0, by_col = 0;

  Mask(const std::optional<at::Tensor>& mask, const Heads& like) {
    if (!mask) return;
    const at::Tensor all = mask->expand({like.batch, like.heads, like.time, like.time});
    type = all.scalar_type();
    TORCH_CHECK(all.is_cpu() && (type == at::kFloat || type == at::kBFloat16 || type == at::kBool),
                "compresskit: a mask in float32, bfloat16 or bool is expected");
    at = all.const_data_ptr();
    by_batch = all.stride(0), by_head = all.stride(1), by_row = all.stride(2), by_col = all.stride(3);
  }

  template <typename T, typename Number>
  void fill(int64_t from, int64_t time, float* row, const Number& number) const {
    const T* x = static_cast<const T*>(at) + from;
    if (by_col == 1)
      for (int64_t c = 0; c < time; ++c) row[c] = number(x[c]);
    else
      for (int64_t c = 0; c < time; ++c) row[c] = number(x[c * by_col]);
  }

  // The numbers of a row, which is still the one that was asked for before if `known` says so
  void row(int64_t one, int64_t head, int64_t r, int64_t time, float* row, const void*& known) const {
    if (!at) return;
    const int64_t from = one * by_batch + head * by_head + r * by_row;
    const void* place = static_cast<const char*>(at) + from * c10::elementSize(type);
    if (place == known) return;
    known = place;
    if (type == at::kFloat)
      fill<float>(from, time, row, [](float x) { return x; });
    else if (type == at::kBFloat16)
      fill<Half>(from, time, row, [](Half x) { return float(x); });
    else
      fill<uint8_t>(from, time, row, [](uint8_t x) { return x ? 0.0f : -INFINITY; });
  }
};

// Room of one thread, all of it at a cache line
struct Bench {
  Room<Half> keys, values, keys_down, part, other_part, turned, packed;
  Room<float> scores, other, sums, other_sums, result, row;
};

template <typename Work>
void for_heads(const Heads& x, int64_t products, const Work& work) {
  const int64_t macs = std::max<int64_t>(1, products * x.time * x.time * x.size);
  at::parallel_for(0, x.batch * x.heads, 1 + HEADS_GRAIN / macs, [&](int64_t begin, int64_t end) {
    thread_local Bench bench;
    for (int64_t i = begin; i < end; ++i) work(bench, i, i / x.heads, i % x.heads);
    _tile_release();
  });
}

// (time, size) as the right side of a product, by columns: scores come out
inline const Half* by_columns(const Heads& x, const Half* from, Room<Half>& room) {
  const Packing right{x.size, x.time};
  Half* to = room.of(right.numbers());
  pack_columns(right, from, x.by_time, 0, x.time, to);
  return to;
}

// The same by rows: sums over time
inline const Half* by_rows(const Heads& x, const Half* from, Room<Half>& room) {
  const Packing right{padded(x.time), x.size};
  Half* to = room.of(right.numbers());
  pack_rows(right, from, x.by_time, x.time, 0, x.size, to);
  return to;
}

// scores (count, padded time) of some rows, of which numbers behind the last are anything
inline void scores_of(const Heads& x, const Half* rows, int64_t by_row, int64_t count, const Half* packed, float* to) {
  const int64_t wide = padded(x.time);
  product(count, Packing{x.size, x.time}, rows, by_row, packed, Sums{to, wide, wide, false});
}

// sums (size, padded time) = or += rows (count, size).T @ part (count, padded time)
inline void add_turned(const Heads& x, const Half* rows, int64_t by_row, int64_t count, const Half* part, bool adds,
                       Bench& bench, float* sums) {
  const int64_t wide = padded(x.time), deep = padded(count);
  Half* turned = bench.turned.of(x.size * deep);
  turn(rows, by_row, count, x.size, turned, deep);
  const Packing right{deep, wide};
  Half* packed = bench.packed.of(right.numbers());
  pack_rows(right, part, wide, count, 0, wide, packed);
  product(x.size, right, turned, deep, packed, Sums{sums, wide, wide, adds});
}

// to (count, size), rounded, = part (count, padded time) @ right side by rows, each row times a factor if there are any
inline void add_over_time(const Heads& x, int64_t count, const Half* part, const Half* packed, const float* factors,
                          Bench& bench, Half* to, int64_t by_row) {
  const int64_t wide = padded(x.time);
  float* result = bench.result.of(count * x.size);
  product(count, Packing{wide, x.size}, part, wide, packed, Sums{result, x.size, x.size, false});
  for (int64_t j = 0; j < count; ++j)
    for (int64_t c = 0; c < x.size; c += TILE) {
      const __m512 found = _mm512_maskz_loadu_ps(until(x.size, c), result + j * x.size + c);
      put_rounded(to + j * by_row, x.size, c, factors ? found * factors[j] : found);
    }
}

// softmax(query @ key.T * scale + mask) @ value, and of each row the logarithm of the sum of its exponentials
std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                             const std::optional<at::Tensor>& mask, double scale) {
  check_units();
  const Heads q(query), k(key), v(value);
  k.check_like(q, true);
  v.check_like(q, false);
  const Mask added(mask, q);
  at::Tensor y = beside(v, value), logs = at::empty({q.batch, q.heads, q.time}, query.options().dtype(at::kFloat));
  const Heads out(y);
  float* log = logs.mutable_data_ptr<float>();
  const int64_t time = q.time, wide = padded(time);
  for_heads(q, 2, [&](Bench& bench, int64_t i, int64_t one, int64_t head) {
    const Half* keys = by_columns(k, k.of(one, head), bench.keys);
    const Half* values = by_rows(v, v.of(one, head), bench.values);
    float* row = bench.row.of(wide);
    std::fill(row, row + wide, 0.0f);
    const void* known = nullptr;
    for (int64_t r = 0; r < time; r += QUERIES) {
      const int64_t count = std::min(QUERIES, time - r);
      float* scores = bench.scores.of(count * wide);
      Half* part = bench.part.of(count * wide);
      float inverse[QUERIES];
      scores_of(q, q.of(one, head, r), q.by_time, count, keys, scores);
      for (int64_t j = 0; j < count; ++j) {
        added.row(one, head, r + j, time, row, known);
        float* of_row = scores + j * wide;
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < time; c += TILE) {
          const __m512 score = _mm512_load_ps(of_row + c) * float(scale) + _mm512_load_ps(row + c);
          most = _mm512_mask_max_ps(most, until(time, c), most, score);
          _mm512_store_ps(of_row + c, score);
        }
        float top = _mm512_reduce_max_ps(most);
        if (top == -INFINITY) top = 0;  // nothing to attend to
        for (int64_t c = 0; c < wide; c += TILE) {
          const __m512 weight = _mm512_maskz_mov_ps(until(time, c), exponential(_mm512_load_ps(of_row + c) - top));
          sum += weight;
          _mm256_store_si256((__m256i*)(part + j * wide + c), (__m256i)_mm512_cvtneps_pbh(weight));
        }
        const float total = _mm512_reduce_add_ps(sum);
        inverse[j] = total > 0 ? 1 / total : 0;
        log[i * time + r + j] = total > 0 ? top + std::log(total) : INFINITY;
      }
      add_over_time(v, count, part, values, inverse, bench, out.of(one, head, r), out.by_time);
    }
  });
  return {y, logs};
}

// Gradients of query, key and value
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& query,
                                                                  const at::Tensor& key, const at::Tensor& value,
                                                                  const std::optional<at::Tensor>& mask, const at::Tensor& logs,
                                                                  double scale) {
  check_units();
  const Heads g(grad), q(query), k(key), v(value);
  k.check_like(q, true);
  v.check_like(q, false);
  g.check_like(v, true);
  const Mask added(mask, q);
  at::Tensor query_grad = beside(q, query), key_grad = beside(k, key), value_grad = beside(v, value);
  const Heads to_q(query_grad), to_k(key_grad), to_v(value_grad);
  const float* log = logs.const_data_ptr<float>();
  const int64_t time = q.time, wide = padded(time);
  for_heads(q, 5, [&](Bench& bench, int64_t i, int64_t one, int64_t head) {
    const Half* keys = by_columns(k, k.of(one, head), bench.keys);
    const Half* values = by_columns(v, v.of(one, head), bench.values);
    const Half* keys_down = by_rows(k, k.of(one, head), bench.keys_down);
    float *row = bench.row.of(wide), *sums = bench.sums.of(q.size * wide), *value_sums = bench.other_sums.of(v.size * wide);
    std::fill(row, row + wide, 0.0f);
    const void* known = nullptr;
    for (int64_t r = 0; r < time; r += QUERIES) {
      const int64_t count = std::min(QUERIES, time - r);
      float *scores = bench.scores.of(count * wide), *backs = bench.other.of(count * wide);
      Half *weights = bench.part.of(count * wide), *part = bench.other_part.of(count * wide);
      scores_of(q, q.of(one, head, r), q.by_time, count, keys, scores);
      scores_of(v, g.of(one, head, r), g.by_time, count, values, backs);
      for (int64_t j = 0; j < count; ++j) {
        added.row(one, head, r + j, time, row, known);
        const __m512 sum = _mm512_set1_ps(log[i * time + r + j]);
        float *of_row = scores + j * wide, *back = backs + j * wide;
        __m512 common = _mm512_setzero_ps();
        for (int64_t c = 0; c < wide; c += TILE) {
          const __m512 score = _mm512_load_ps(of_row + c) * float(scale) + _mm512_load_ps(row + c) - sum;
          const __m512 weight = _mm512_maskz_mov_ps(until(time, c), exponential(score));
          _mm512_store_ps(of_row + c, weight);
          _mm256_store_si256((__m256i*)(weights + j * wide + c), (__m256i)_mm512_cvtneps_pbh(weight));
          common += weight * _mm512_maskz_loadu_ps(until(time, c), back + c);
        }
        const float mean = _mm512_reduce_add_ps(common);
        for (int64_t c = 0; c < wide; c += TILE) {
          const __m512 apart = _mm512_maskz_loadu_ps(until(time, c), back + c) - mean;
          const __m512 change = apart * _mm512_load_ps(of_row + c) * float(scale);
          _mm256_store_si256((__m256i*)(part + j * wide + c), (__m256i)_mm512_cvtneps_pbh(change));
        }
      }
      add_turned(v, g.of(one, head, r), g.by_time, count, weights, r > 0, bench, value_sums);
      add_turned(q, q.of(one, head, r), q.by_time, count, part, r > 0, bench, sums);
      add_over_time(q, count, part, keys_down, nullptr, bench, to_q.of(one, head, r), to_q.by_time);
    }
    turn_back(sums, wide, time, k.size, 1, to_k.of(one, head), to_k.by_time);
    turn_back(value_sums, wide, time, v.size, 1, to_v.of(one, head), to_v.by_time);
  });
  return {query_grad, key_grad, value_grad};
}

// The sum over pairs that count of (scores - others)^2, scores being query @ key.T / sqrt(size), and its gradients with
// respect to query and key; `other_query` and `other_key` may have another size
std::tuple<at::Tensor, at::Tensor, at::Tensor> score_squares(const at::Tensor& query, const at::Tensor& key,
                                                             const at::Tensor& other_query, const at::Tensor& other_key,
                                                             const at::Tensor& pairs) {
  check_units();
  const Heads q(query), k(key), others(other_query), other_keys(other_key);
  k.check_like(q, true);
  others.check_like(q, false);
  other_keys.check_like(others, true);
  const Mask counts(pairs, q);
  at::Tensor query_grad = beside(q, query), key_grad = beside(k, key);
  const Heads to_q(query_grad), to_k(key_grad);
  std::vector<double> squares(q.batch * q.heads);
  const float scale = 1 / std::sqrt(float(q.size)), other_scale = 1 / std::sqrt(float(others.size));
  const int64_t time = q.time, wide = padded(time);
  for_heads(q, 4, [&](Bench& bench, int64_t i, int64_t one, int64_t head) {
    const Half* keys = by_columns(k, k.of(one, head), bench.keys);
    const Half* keys_down = by_rows(k, k.of(one, head), bench.keys_down);
    const Half* theirs = by_columns(other_keys, other_keys.of(one, head), bench.values);
    float *row = bench.row.of(wide), *sums = bench.sums.of(q.size * wide);
    std::fill(row, row + wide, 0.0f);
    const void* known = nullptr;
    for (int64_t r = 0; r < time; r += QUERIES) {
      const int64_t count = std::min(QUERIES, time - r);
      float *scores = bench.scores.of(count * wide), *asked = bench.other.of(count * wide);
      Half* part = bench.part.of(count * wide);
      scores_of(q, q.of(one, head, r), q.by_time, count, keys, scores);
      scores_of(others, others.of(one, head, r), others.by_time, count, theirs, asked);
      float factors[QUERIES];
      for (int64_t j = 0; j < count; ++j) {
        counts.row(one, head, r + j, time, row, known);
        factors[j] = 2 * scale;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < wide; c += TILE) {
          const int64_t at = j * wide + c;
          const __mmask16 real = _mm512_cmp_ps_mask(_mm512_load_ps(row + c), _mm512_setzero_ps(), _CMP_EQ_OQ);
          const __m512 both = _mm512_load_ps(scores + at) * scale - _mm512_load_ps(asked + at) * other_scale;
          const __m512 apart = _mm512_maskz_mov_ps(until(time, c) & real, both);
          sum += apart * apart;
          _mm256_store_si256((__m256i*)(part + at), (__m256i)_mm512_cvtneps_pbh(apart));
        }
        squares[i] += _mm512_reduce_add_ps(sum);
      }
      add_turned(q, q.of(one, head, r), q.by_time, count, part, r > 0, bench, sums);
      add_over_time(q, count, part, keys_down, factors, bench, to_q.of(one, head, r), to_q.by_time);
    }
    turn_back(sums, wide, time, k.size, 2 * scale, to_k.of(one, head), to_k.by_time);
  });
  double total = 0;
  for (const double square : squares) total += square;
  return {at::full({}, total, query.options().dtype(at::kFloat)), query_grad, key_grad};
}

}  // namespace half
#endif
