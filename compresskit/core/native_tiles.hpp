// Products by the matrix units of the processor (AMX): bfloat16 in, sums in float32. A tile has 16 rows of 64 bytes: the
// left side is read as it lies, the right one packed. Nothing has to be a whole number of tiles.

#if defined(COMPRESSKIT_HALF)

namespace half {

using Half = at::BFloat16;

constexpr int64_t TILE = 16;   // rows of a tile, and columns of sums
constexpr int64_t DEPTH = 32;  // numbers that are added up by one instruction
constexpr int64_t PAIR = 2 * TILE;  // rows and columns of sums that are computed together
constexpr int64_t PACKED = TILE * DEPTH;  // numbers of a packed tile: pairs of neighbours in depth beside each other

// Tiles 0 to 3 are sums, 4 and 5 of the left side, 6 and 7 of the right one
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Shapes(int64_t first, int64_t second, int64_t depth) {
    const int64_t high[8] = {first, first, second, second, first, second, depth / 2, depth / 2};
    for (int i = 0; i < 8; ++i) {
      rows[i] = std::max<int64_t>(1, high[i]);
      bytes[i] = i == 4 || i == 5 ? 2 * depth : 4 * TILE;
    }
  }
};

// Whether the system lets this process use the units
inline bool may_use_units() {
  constexpr int ASK = 0x1023, TILES = 18;
  return syscall(SYS_arch_prctl, ASK, TILES) == 0;
}

inline void check_units() {
  static const bool allowed = may_use_units();
  TORCH_CHECK(allowed, "compresskit: the system does not let this process use the matrix units for bfloat16");
}

// The right side of a product, (depth, width): for each 16 columns and each 32 of depth a packed tile. Where depth is no
// multiple of 32, the last tile begins earlier, at `at`, with zeros for what tiles before it have
struct Packing {
  int64_t depth, width;

  int64_t tiles() const { return std::max<int64_t>(1, (depth + DEPTH - 1) / DEPTH); }
  int64_t columns() const { return (width + TILE - 1) / TILE; }
  int64_t numbers() const { return tiles() * columns() * PACKED; }
  int64_t at(int64_t tile) const { return std::max<int64_t>(0, std::min(tile * DEPTH, depth - DEPTH)); }
};

// Sums of up to 32 x 32: left side from a on, right side from two packed columns on. `meanwhile(0)` to `meanwhile(3)` are
// done between the first products: other work of this core, of which few instructions may wait at a time
template <int DOWN, int ACROSS, typename Meanwhile>
inline void add_tiles(const Packing& right, const Half* a, int64_t a_step, const Half* b, const Meanwhile& meanwhile) {
  const Half *below = a + TILE * a_step, *beside = b + right.tiles() * PACKED;
  const int64_t bytes = 2 * a_step;
  for (int64_t k = 0; k < right.tiles(); ++k) {
    const int64_t at = right.at(k);
    _tile_loadd(4, a + at, bytes);
    _tile_loadd(6, b + k * PACKED, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (k == 0) meanwhile(0);
    if constexpr (ACROSS == 2) {
      _tile_loadd(7, beside + k * PACKED, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (k == 0) meanwhile(1);
    if constexpr (DOWN == 2) {
      _tile_loadd(5, below + at, bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (k == 0) meanwhile(2);
    if constexpr (DOWN == 2 && ACROSS == 2) _tile_dpbf16ps(3, 5, 7);
    if (k == 0) meanwhile(3);
  }
}

template <int DOWN, int ACROSS>
inline void store_tiles(float* c, int64_t step) {
  const int64_t bytes = 4 * step;
  _tile_stored(0, c, bytes);
  if constexpr (ACROSS == 2) _tile_stored(1, c + TILE, bytes);
  if constexpr (DOWN == 2) _tile_stored(2, c + TILE * step, bytes);
  if constexpr (DOWN == 2 && ACROSS == 2) _tile_stored(3, c + TILE * step + TILE, bytes);
}

template <int DOWN, int ACROSS>
inline void load_tiles(const float* c, int64_t step) {
  const int64_t bytes = 4 * step;
  _tile_loadd(0, c, bytes);
  if constexpr (ACROSS == 2) _tile_loadd(1, c + TILE, bytes);
  if constexpr (DOWN == 2) _tile_loadd(2, c + TILE * step, bytes);
  if constexpr (DOWN == 2 && ACROSS == 2) _tile_loadd(3, c + TILE * step + TILE, bytes);
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Where sums go: to c (rows, width), in float32 and `step` apart, or added to what is there
struct Sums {
  float* c;
  int64_t width, step;
  bool adds;

  template <int DOWN, int ACROSS, typename Add>
  void take(int64_t row, int64_t rows, int64_t column, const Add& add) {
    float* const to = c + row * step + column;
    if (const int64_t some = width - column; some < ACROSS * TILE) {  // a tile that would reach into the next row
      alignas(64) float all[PAIR * PAIR];
      for (int64_t r = 0; adds && r < rows; ++r) std::copy(to + r * step, to + r * step + some, all + r * PAIR);
      adds ? load_tiles<DOWN, ACROSS>(all, PAIR) : zero_tiles();
      add([](int) {});
      store_tiles<DOWN, ACROSS>(all, PAIR);
      for (int64_t r = 0; r < rows; ++r) std::copy(all + r * PAIR, all + r * PAIR + some, to + r * step);
      return;
    }
    adds ? load_tiles<DOWN, ACROSS>(to, step) : zero_tiles();
    add([](int) {});
    store_tiles<DOWN, ACROSS>(to, step);
  }
  void finish() {}
};

// ... or to y (rows, width), rounded, plus `added`, which may be null and begins anew after `period` rows. What the units
// have summed up is rounded while they are at the next sums
struct RoundedSums {
  Half* y;
  int64_t width;
  const float* added;
  int64_t period;
  int64_t row = 0, rows = 0, column = 0;
  int which = 0;
  alignas(64) float kept[2][PAIR * PAIR];

  template <int DOWN, int ACROSS, typename Add>
  void take(int64_t from, int64_t some, int64_t at, const Add& add) {
    if (period == 1 && added && width - at >= ACROSS * TILE)
      load_tiles<DOWN, ACROSS>(added + at, 0);
    else
      zero_tiles();
    add([&](int quarter) { round(quarter); });
    which = 1 - which;
    store_tiles<DOWN, ACROSS>(kept[which], PAIR);
    row = from, rows = some, column = at;
  }

  // A quarter of what is kept
  void round(int quarter) {
    const int64_t begin = quarter * PAIR / 4, end = std::min(rows, begin + PAIR / 4), some = std::min(PAIR, width - column);
    const __mmask32 mask = some == PAIR ? ~0u : (1u << some) - 1;
    const bool adds = added && (period != 1 || some % TILE);
    for (int64_t r = begin; r < end; ++r) {
      __m512 low = _mm512_load_ps(kept[which] + r * PAIR), high = _mm512_load_ps(kept[which] + r * PAIR + TILE);
      if (adds) {
        const float* plus = added + (row + r) % period * width + column;
        low += _mm512_maskz_loadu_ps(__mmask16(mask), plus);
        high += _mm512_maskz_loadu_ps(__mmask16(mask >> TILE), plus + TILE);
      }
      _mm512_mask_storeu_epi16(y + (row + r) * width + column, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

  void finish() {
    for (int quarter = 0; quarter < 4; ++quarter) round(quarter);
    rows = 0;
  }
};

template <int DOWN, typename To>
void product_rows(int64_t begin, int64_t end, int64_t height, const Packing& right, const Half* a, int64_t a_step,
                  const Half* b, To& to) {
  for (int64_t o = 0; o < right.columns(); o += 2) {
    const Half* from = b + o * right.tiles() * PACKED;
    for (int64_t r = begin; r < end; r += height) {
      const Half* left = a + r * a_step;
      if (o + 1 < right.columns())
        to.template take<DOWN, 2>(r, height, o * TILE, [&](const auto& also) { add_tiles<DOWN, 2>(right, left, a_step, from, also); });
      else
        to.template take<DOWN, 1>(r, height, o * TILE, [&](const auto& also) { add_tiles<DOWN, 1>(right, left, a_step, from, also); });
    }
  }
}

// a (rows, depth) @ b, packed, goes `to` somewhere. The units are set up anew: release them afterwards
template <typename To>
void product(int64_t rows, const Packing& right, const Half* a, int64_t a_step, const Half* b, To to) {
  asm volatile("" ::: "memory");  // what the units read is written before: not all compilers know that they read
  const int64_t whole = rows / PAIR * PAIR, rest = rows - whole, depth = std::min(DEPTH, right.depth);
  if (whole) {
    const Shapes shapes(TILE, TILE, depth);
    _tile_loadconfig(&shapes);
    product_rows<2>(0, whole, PAIR, right, a, a_step, b, to);
  }
  if (rest) {
    const Shapes shapes(std::min(TILE, rest), rest - TILE, depth);
    _tile_loadconfig(&shapes);
    if (rest > TILE)
      product_rows<2>(whole, rows, rest, right, a, a_step, b, to);
    else
      product_rows<1>(whole, rows, rest, right, a, a_step, b, to);
  }
  to.finish();
  asm volatile("" ::: "memory");
}

// y (16, 16) = x (16, 16).T, rows `x_step` and `y_step` apart; the first `some` rows of y. Numbers are moved, never
// computed with: they may be pairs of others.
inline void transpose(const float* x, int64_t x_step, float* y, int64_t y_step, int64_t some = TILE) {
  Lanes now[TILE];
  for (int v = 0; v < TILE; ++v) now[v] = *(const Lanes*)(x + v * x_step);
  interleave<TILE>(now);
  for (int v = 0; v < some; ++v) *(Lanes*)(y + v * y_step) = now[v];
}

// Some columns of a right side, from a multiple of 16 on, packed: the rows of x (width, depth), `step` apart
inline void pack_columns(const Packing& right, const Half* x, int64_t step, int64_t begin, int64_t end, Half* y) {
  for (int64_t o = begin; o < end; o += TILE)
    for (int64_t k = 0; k < right.tiles(); ++k, y += PACKED) {
      const int64_t at = right.at(k), skip = k * DEPTH - at, some = std::min(DEPTH, right.depth - at);
      const Half* from = x + o * step + at;
      if (o + TILE <= right.width && skip == 0 && some == DEPTH && step % 2 == 0) {
        transpose(reinterpret_cast<const float*>(from), step / 2, reinterpret_cast<float*>(y), TILE);
        continue;
      }
      alignas(64) Half part[PACKED] = {};
      for (int64_t j = 0; j < TILE && o + j < right.width; ++j)
        std::copy(from + j * step + skip, from + j * step + some, part + j * DEPTH + skip);
      transpose(reinterpret_cast<const float*>(part), TILE, reinterpret_cast<float*>(y), TILE);
    }
}

// Pairs of `some` neighbours of two rows
inline void zip_rows(const Half* even, const Half* odd, __mmask32 some, Half* low, Half* high) {
  static constexpr uint16_t LOW[DEPTH] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_loadu_si512(LOW), then = _mm512_add_epi16(first, _mm512_set1_epi16(TILE));
  const __m512i a = even ? _mm512_maskz_loadu_epi16(some, even) : __m512i{}, b = odd ? _mm512_maskz_loadu_epi16(some, odd) : __m512i{};
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, first, b));
  if (high) _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, then, b));
}

// The same, but x (rows, ...) has a row for each of depth, `step` apart; those that are not there are zeros
inline void pack_rows(const Packing& right, const Half* x, int64_t step, int64_t rows, int64_t begin, int64_t end, Half* y) {
  const int64_t next = right.tiles() * PACKED;
  for (int64_t o = begin; o < end; o += PAIR, y += 2 * next) {
    const int64_t some = std::min(PAIR, right.width - o);
    const __mmask32 mask = some == PAIR ? ~0u : (1u << some) - 1;
    for (int64_t k = 0; k < right.tiles(); ++k) {
      const int64_t at = right.at(k), fresh = k * DEPTH;
      for (int64_t p = 0; p < TILE; ++p) {
        const int64_t i = at + 2 * p;
        const auto row = [&](int64_t i) { return i >= fresh && i < rows ? x + i * step + o : nullptr; };
        Half* to = y + k * PACKED + p * DEPTH;
        zip_rows(row(i), row(i + 1), mask, to, some > TILE ? to + next : nullptr);
      }
    }
  }
}

}  // namespace half
#endif
