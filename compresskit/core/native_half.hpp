// bfloat16 for native.cpp: large products by the matrix units of the processor (native_tiles.hpp) with sums in float32,
// everything between two of them in float32. Only where the processor has instructions for it: see `half_products`.

#if defined(COMPRESSKIT_HALF)

namespace half {

constexpr int64_t GRAIN = 3 << 20;    // multiply-adds of the units that are worth another thread
constexpr int64_t FEW_GRAIN = 1 << 20;  // the same where a factor is read once
constexpr int64_t MIXED = 8;          // multiply-adds of the units that take as long as one of the others
constexpr int64_t FEW_ROWS = 64;      // of a product up to which its input is packed and not its factor
constexpr int64_t BLOCK_ROWS = 32;     // of a product whose results are wide: each row is a page to be written
constexpr int64_t BLOCK_NUMBERS = 1 << 14;
constexpr int64_t MIXED_NUMBERS = 1 << 13;  // in float32 between steps of other kinds: for the first-level cache
constexpr int64_t PACK_GRAIN = 1 << 16;  // numbers to pack that are worth another thread
constexpr int64_t OWN_NUMBERS = 1 << 17;  // up to which each thread packs for itself, before it would fetch them from another

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

inline std::vector<Room<Half>>& at_least(std::vector<Room<Half>>& rooms, size_t count) {
  if (rooms.size() < count) rooms.resize(count);
  return rooms;
}

// A factor (outs, ins) of the last axis as the right side of products, on the way there or, `back`, on the one back
struct Right {
  const Half* factor = nullptr;
  int64_t outs = 0, ins = 0;
  bool back = false;
  const Half* shared = nullptr;

  Packing packing() const { return back ? Packing{outs, ins} : Packing{ins, outs}; }

  void pack(int64_t begin, int64_t end, Half* to) const {
    back ? pack_rows(packing(), factor, ins, outs, begin, end, to) : pack_columns(packing(), factor, ins, begin, end, to);
  }

  // Packs a large one by all threads for all of them
  void share(Room<Half>& room) {
    if (outs * ins <= OWN_NUMBERS) return;
    const Packing right = packing();
    const int64_t of_each = 2 * right.tiles() * PACKED;
    Half* to = room.of(right.numbers());
    at::parallel_for(0, (right.columns() + 1) / 2, 1 + PACK_GRAIN / of_each, [&](int64_t begin, int64_t end) {
      pack(begin * PAIR, std::min(right.width, end * PAIR), to + begin * of_each);
    });
    shared = to;
  }

  // The packed one, a small one by this thread for itself
  const Half* here(Room<Half>& room) const {
    if (shared) return shared;
    Half* to = room.of(packing().numbers());
    pack(0, packing().width, to);
    return to;
  }
};

// c (rows, outs) = a (rows, ins) @ factor.T, packed
void multiply(int64_t rows, const Step& step, const Half* a, const Half* right, float* c) {
  product(rows, Packing{step.b, step.c}, a, step.b, right, Sums{c, step.c, step.c, false});
}

// The same plus `added`, which begins anew after `step.a` rows and may be null, rounded
void multiply_round(int64_t rows, const Step& step, const Half* a, const Half* right, const float* added, Half* c) {
  product(rows, Packing{step.b, step.c}, a, step.b, right, RoundedSums{c, step.c, added, step.a});
}

// The same of few rows, where packing the factor would take most of the time: factor @ a.T, by all threads
void multiply_few(int64_t rows, const Step& step, const Half* a, const Half* factor, float* c) {
  const int64_t outs = step.c, ins = step.b, width = (rows + TILE - 1) / TILE * TILE;
  const Packing right{ins, rows};
  thread_local Room<Half> packed;
  Half* to = packed.of(right.numbers());
  pack_columns(right, a, ins, 0, rows, to);
  at::parallel_for(0, (outs + TILE - 1) / TILE, 1 + FEW_GRAIN / (width * ins * TILE), [&](int64_t begin, int64_t end) {
    thread_local Room<float> room;
    const int64_t first = begin * TILE, after = std::min(outs, end * TILE);
    float* turned = room.of((end - begin) * TILE * width);
    product(after - first, right, factor + first * ins, ins, to, Sums{turned, width, width, false});
    _tile_release();
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
  const Half* factor = nullptr;  // of a product
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
      segment.factor = factor;
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

// A step of another kind of one token
template <typename In, typename Out>
void mix_step(const Step& step, const In* x, Out y) {
  if (step.kind == FIRST)
    mix(step.factor, step.a, step.b, x, y, nullptr, step.c);
  else
    swap(x, y, step.a, step.b);
}

// Steps of other kinds of n tokens, plus `added`, which may be null, rounded
template <typename In>
void mix_segment(const Segment& segment, int64_t n, const In* x, const float* added, Half* y) {
  const int64_t ins = segment.ins(), outs = segment.outs(), last = segment.count - 1;
  const Chunk room(segment, 0);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i <= last; ++i) {
      const Step& step = segment.steps[i];
      const auto to = [&](auto out) {
        i == 0 ? mix_step(step, x + t * ins, out) : mix_step(step, room.halves[1 - i % 2], out);
      };
      i == last ? to(Rounded{y + t * outs, added}) : to(Written{room.halves[i % 2]});
    }
}

inline void check_depth(int64_t depth) {
  TORCH_CHECK(depth % 2 == 0 || depth >= DEPTH, "compresskit: bfloat16 is multiplied in pairs, and ", depth, " is odd");
}

// Of a token, in multiply-adds of the units
int64_t work_of(const Chain& made) {
  int64_t work = 0;
  for (const Step& step : made.steps)
    work += step.kind == LAST ? step.macs() : MIXED * (step.kind == FIRST ? step.macs() : step.ins());
  return work;
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
  std::vector<Right> rights(count_segments);
  thread_local std::vector<Room<Half>> shared;
  int64_t between = cols;
  for (size_t k = 0; k < count_segments; ++k) {
    between = std::max(between, segments[k].outs());
    if (!segments[k].multiplies()) continue;
    const Step& step = *segments[k].steps;
    check_depth(step.b);
    rights[k] = {segments[k].factor, step.c, step.b, false};
    if (!few) rights[k].share(at_least(shared, count_segments)[k]);
  }

  const int64_t block = std::min(n, std::max({int64_t(1), BLOCK_NUMBERS / between, BLOCK_ROWS / made.groups}));
  at::parallel_for(0, n, few ? n : std::max<int64_t>(1, GRAIN / work_of(made)), [&](int64_t begin, int64_t end) {
    thread_local Room<float> room;
    thread_local Room<Half> half_rooms[2];
    thread_local std::vector<Room<Half>> own;
    std::vector<const Half*> right(count_segments);
    for (size_t k = 0; k < count_segments; ++k)
      if (segments[k].multiplies()) right[k] = few ? segments[k].factor : rights[k].here(at_least(own, count_segments)[k]);
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
          multiply_round(count * segment->steps->a, *segment->steps, in, right[k], plus, out);
        } else {
          (few ? multiply_few : multiply)(count * segment->steps->a, *segment->steps, in, right[k], sums);
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
    _tile_release();
  });
  return y;
}

}  // namespace half
#endif
