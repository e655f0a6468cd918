// bfloat16 for native.cpp: large products by the matrix units of the processor (PyTorch's brgemm) with sums in float32,
// everything between two of them in float32. Only where the processor has instructions for it: see `half_products`.

#if defined(COMPRESSKIT_HALF)

namespace half {

using Half = at::BFloat16;

constexpr int64_t PANEL = 64;            // columns of a packed factor that lie together
constexpr int64_t TILE = 16;          // columns that the units read at once
constexpr int64_t GRAIN = 1 << 20;    // multiply-adds that are worth another thread
constexpr int64_t FEW_ROWS = 64;      // of a product up to which its input is packed and not its factor
constexpr int64_t SOME_ROWS = 64;     // of a product whose sums are rounded at once, while they are at hand
constexpr int64_t BLOCK_ROWS = 64;    // of a large product
constexpr int64_t BLOCK_NUMBERS = 1 << 15;
constexpr int64_t MIXED_NUMBERS = 1 << 13;  // in float32 between steps of other kinds: for the first-level cache
constexpr int64_t PACK_GRAIN = 1 << 16;  // numbers to pack that are worth another thread

void widen(const Half* x, float* y, int64_t count) {
  const auto* bits = reinterpret_cast<const uint16_t*>(x);
  auto* words = reinterpret_cast<uint32_t*>(y);
  for (int64_t i = 0; i < count; ++i) words[i] = uint32_t(bits[i]) << 16;
}

// y = x + added, rounded; added may be null
void narrow(const float* x, const float* added, Half* y, int64_t count) {
  const Rounded to{y, added};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) to.put(i, lanes_at(x + i));
  for (; i < count; ++i) to.put(i, x[i]);
}

// y (16, 16) = x (16, 16).T, rows `x_step` and `y_step` apart; the first `some` rows of y. Numbers are moved, never
// computed with: they may be pairs of others.
inline void transpose(const float* x, int64_t x_step, float* y, int64_t y_step, int64_t some = TILE) {
  Lanes now[TILE];
  for (int v = 0; v < TILE; ++v) now[v] = *(const Lanes*)(x + v * x_step);
  interleave<TILE>(now);
  for (int v = 0; v < some; ++v) *(Lanes*)(y + v * y_step) = now[v];
}

// Rows of `ins` numbers as the units read a right side `width` wide: pairs of one row beside each other, zeros for rows
// that are not there
void pack(const Half* x, int64_t rows, int64_t ins, int64_t width, Half* y) {
  const auto* from = reinterpret_cast<const float*>(x);
  auto* to = reinterpret_cast<float*>(y);
  const int64_t pairs = ins / 2;
  for (int64_t r = 0; r < width; r += TILE) {
    int64_t i = 0;
    if (r + TILE <= rows)
      for (; i + TILE <= pairs; i += TILE) transpose(from + r * pairs + i, pairs, to + i * width + r, width);
    for (; i < pairs; ++i)
      for (int64_t v = r; v < r + TILE; ++v)
        if (v < rows)
          std::memcpy(to + i * width + v, from + v * pairs + i, sizeof(float));
        else
          to[i * width + v] = 0;
  }
}

// A step of the last axis: its factor (outs, ins), and the same in panels, each (ins / 2, PANEL, 2), without any for few rows
struct Wide {
  const Half* factor;
  const Half* packed = nullptr;
};

// All panels of a right side (depth, width), each by `pack_panel(first column, where to)`
template <typename PackPanel>
void pack_panels(int64_t width, int64_t depth, Wide& wide, Room<Half>& room, const PackPanel& pack_panel) {
  const int64_t panels = (width + PANEL - 1) / PANEL;
  Half* to = room.of(panels * PANEL * depth);
  at::parallel_for(0, panels, 1 + PACK_GRAIN / (PANEL * depth), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_panel(p * PANEL, to + p * PANEL * depth);
  });
  wide.packed = to;
}

void pack_all(const Step& step, Wide& wide, Room<Half>& room) {
  pack_panels(step.c, step.b, wide, room, [&](int64_t column, Half* to) {
    pack(wide.factor + column * step.b, std::min(PANEL, step.c - column), step.b, PANEL, to);
  });
}

void panel(int64_t rows, const Step& step, const Half* a, const Wide& wide, int64_t at, float* c, int64_t c_step) {
  at::native::cpublas::brgemm(rows, std::min(PANEL, step.c - at), step.b, step.b, PANEL, c_step, false, a,
                              wide.packed + at * step.b, c);
}

// c (rows, outs) = a (rows, ins) @ factor.T
void multiply(int64_t rows, const Step& step, const Half* a, const Wide& wide, float* c) {
  for (int64_t p = 0; p < step.c; p += PANEL) panel(rows, step, a, wide, p, c + p, step.c);
}

// The same plus `added`, which begins anew after `step.a` rows and may be null, rounded
void multiply_round(int64_t rows, const Step& step, const Half* a, const Wide& wide, const float* added, Half* c) {
  alignas(64) float sums[SOME_ROWS * PANEL];
  for (int64_t r = 0; r < rows; r += SOME_ROWS) {
    const int64_t some = std::min(SOME_ROWS, rows - r);
    for (int64_t p = 0; p < step.c; p += PANEL) {
      panel(some, step, a + r * step.b, wide, p, sums, PANEL);
      for (int64_t k = 0; k < some; ++k)
        narrow(sums + k * PANEL, added ? added + (r + k) % step.a * step.c + p : nullptr, c + (r + k) * step.c + p,
               std::min(PANEL, step.c - p));
    }
  }
}

// The same of few rows, where packing the factor would take most of the time: factor @ a.T, by all threads
void multiply_few(int64_t rows, const Step& step, const Half* a, const Wide& wide, float* c) {
  const int64_t outs = step.c, ins = step.b, width = (rows + TILE - 1) / TILE * TILE;
  thread_local Room<Half> packed;
  Half* right = packed.of(width * ins);
  pack(a, rows, ins, width, right);
  at::parallel_for(0, (outs + TILE - 1) / TILE, 1 + GRAIN / (width * ins * TILE), [&](int64_t begin, int64_t end) {
    thread_local Room<float> room;
    const int64_t first = begin * TILE, after = std::min(outs, end * TILE);
    float* turned = room.of((end - begin) * TILE * width);
    at::native::cpublas::brgemm(after - first, width, ins, ins, width, width, false, wide.factor + first * ins, right,
                                turned);
    at::native::cpublas::brgemm_release();  // by each thread: others of PyTorch's products set up the units anew
    for (int64_t o = first; o < after; o += TILE)
      for (int64_t r = 0; r < rows; r += TILE) {
        const float* from = turned + (o - first) * width + r;
        const int64_t some = std::min(TILE, rows - r);
        if (o + TILE <= after) {
          transpose(from, width, c + r * outs + o, outs, some);
          continue;
        }
        for (int64_t k = 0; k < some; ++k)
          for (int64_t i = o; i < after; ++i) c[(r + k) * outs + i] = from[(i - o) * width + k];
      }
  });
}

// A product of the last axis, or neighbouring steps of other kinds, which are done in float32 and rounded in the end
struct Segment {
  const Step* steps;
  int64_t first, count = 0, at = 0;  // its first step and how many; where what comes in is kept, for one token
  Wide there, back;
  std::vector<std::vector<float>> small, turned;  // factors of the first axis, and transposed

  bool multiplies() const { return steps->kind == LAST; }
  int64_t ins() const { return steps->ins(); }
  int64_t outs() const { return steps[count - 1].outs(); }
};

// Those of a chain whose steps are copied to `steps`, with factors of the first axis in float32
std::vector<Segment> segments_of(const Chain& made, std::vector<Step>& steps) {
  steps = made.steps;
  std::vector<Segment> found;
  for (int64_t i = 0; i < int64_t(steps.size()); ++i) {
    Step& step = steps[i];
    if (step.kind == LAST || i == 0 || steps[i - 1].kind == LAST) found.push_back({&step, i});
    Segment& segment = found.back();
    ++segment.count;
    const Half* factor = step.kind == SWAP ? nullptr : made.held[made.factor_of[i]].const_data_ptr<Half>();
    if (step.kind == LAST) {
      segment.there.factor = segment.back.factor = factor;
      continue;
    }
    segment.small.emplace_back(factor ? step.a * step.b : 0);
    if (!factor) continue;
    widen(factor, segment.small.back().data(), step.a * step.b);
    step.factor = segment.small.back().data();
  }
  return found;
}

// Room for some tokens of a segment that are done at a time: for `kept` numbers of each, and for two steps
struct Chunk {
  int64_t tokens;
  float *kept, *halves[2];

  Chunk(const Segment& segment, int64_t kept_of_each) {
    int64_t most = 1;
    for (int64_t i = 0; i < segment.count; ++i) most = std::max({most, segment.steps[i].ins(), segment.steps[i].outs()});
    tokens = std::max<int64_t>(1, MIXED_NUMBERS / (kept_of_each + 2 * most));
    thread_local Room<float> room;
    kept = room.of(tokens * (kept_of_each + 2 * most));
    halves[0] = kept + tokens * kept_of_each;
    halves[1] = halves[0] + tokens * most;
  }
};

// Steps of other kinds of n tokens, plus `added`, which may be null, rounded
template <typename In>
void mix_segment(const Segment& segment, int64_t n, const In* x, const float* added, Half* y) {
  const int64_t ins = segment.ins(), outs = segment.outs(), last = segment.count - 1;
  const Chunk chunk(segment, 0);
  for (int64_t t = 0; t < n; t += chunk.tokens) {
    const int64_t some = std::min(chunk.tokens, n - t);
    const float* in = nullptr;
    int64_t i = 0;
    const auto next = [&] { return chunk.halves[i % 2]; };
    if (const Step& step = *segment.steps; step.kind == SWAP && last > 0) {
      for (int64_t k = 0; k < some; ++k) swap(x + (t + k) * ins, Written{next() + k * ins}, step.a, step.b);
      in = next(), ++i;
    } else if constexpr (std::is_same_v<In, float>) {
      in = x + t * ins;
    } else if (last > 0 || step.kind != SWAP) {
      widen(x + t * ins, chunk.halves[1], some * ins);
      in = chunk.halves[1];
    }
    for (; i < last; ++i) {
      run(segment.steps[i], some, in, next(), nullptr);
      in = next();
    }
    const Step& step = segment.steps[last];
    if (step.kind != SWAP) {
      run(step, some, in, next(), nullptr);
      for (int64_t k = 0; k < some; ++k) narrow(next() + k * outs, added, y + (t + k) * outs, outs);
      continue;
    }
    for (int64_t k = 0; k < some; ++k) {
      const Rounded to{y + (t + k) * outs, added};
      in ? swap(in + k * outs, to, step.a, step.b) : swap(x + (t + k) * outs, to, step.a, step.b);
    }
  }
}

at::Tensor chain(Chain& made, const at::Tensor& x, const std::optional<at::Tensor>& bias) {
  const int64_t cols = made.cols, rows = made.rows, n = x.numel() / cols;
  const Half* from = made.take<Half>(x, cols);
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  at::Tensor y = at::empty(shape, x.options());
  Half* to = y.mutable_data_ptr<Half>();
  std::vector<float> wider(bias ? rows : 0);
  const float* added = bias ? wider.data() : nullptr;
  if (bias) widen(made.take<Half>(*bias, rows), wider.data(), rows);

  const bool few = n * made.groups <= FEW_ROWS;
  std::vector<Step> steps;
  std::vector<Segment> segments = segments_of(made, steps);
  const size_t count_segments = segments.size();
  thread_local std::vector<Room<Half>> packed;
  if (packed.size() < count_segments) packed.resize(count_segments);
  int64_t between = cols;
  for (size_t k = 0; k < count_segments; ++k) {
    between = std::max(between, segments[k].outs());
    if (!segments[k].multiplies()) continue;
    const Step& step = *segments[k].steps;
    TORCH_CHECK(step.b % 2 == 0, "compresskit: bfloat16 is multiplied in pairs, and ", step.b, " is odd");
    if (!few) pack_all(step, segments[k].there, packed[k]);
  }

  const int64_t block = std::min(n, std::max({int64_t(1), BLOCK_NUMBERS / between, BLOCK_ROWS / made.groups}));
  at::parallel_for(0, n, few ? n : std::max<int64_t>(1, GRAIN / made.macs), [&](int64_t begin, int64_t end) {
    thread_local Room<float> room;
    thread_local Room<Half> half_rooms[2];
    float* const sums = room.of(block * between);
    Half* const rounded[2] = {half_rooms[0].of(block * between), half_rooms[1].of(block * between)};
    for (int64_t t = begin; t < end; t += block) {
      const int64_t count = std::min(block, end - t);
      const Half* in = from + t * cols;
      for (size_t k = 0; k < count_segments; ++k) {
        const Segment* segment = &segments[k];
        const bool mixes_next = segment->multiplies() && k + 1 < count_segments && !segments[k + 1].multiplies();
        const bool final = k + 1 + mixes_next == count_segments;
        const float* plus = final ? added : nullptr;
        Half* out = final ? to + t * rows : rounded[k % 2];
        if (!segment->multiplies()) {
          mix_segment(*segment, count, in, plus, out);
        } else if (!few && !mixes_next) {
          multiply_round(count * segment->steps->a, *segment->steps, in, segment->there, plus, out);
        } else {
          (few ? multiply_few : multiply)(count * segment->steps->a, *segment->steps, in, segment->there, sums);
          if (mixes_next) {
            mix_segment(segments[++k], count, sums, plus, out);
          } else {
            const int64_t outs = segment->outs();
            for (int64_t j = 0; j < count; ++j) narrow(sums + j * outs, plus, out + j * outs, outs);
          }
        }
        in = out;
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return y;
}

}  // namespace half
#endif
