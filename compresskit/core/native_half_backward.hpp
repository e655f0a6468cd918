// The way back of native_half.hpp: sums over tokens by the matrix units as well, gradients of factors in float32.

#if defined(COMPRESSKIT_HALF)

namespace half {

constexpr int64_t SUMMED_COLUMNS = 64;      // that are packed at once
constexpr int64_t SUMMED_ROWS = 256;        // of a sum over tokens: with less, most of the time goes into adding to it
constexpr int64_t SUMMED_NUMBERS = 1 << 18;

// y (width, depth) = x (rows, width).T, zeros for rows that are not there
void turn(const Half* x, int64_t rows, int64_t depth, int64_t width, Half* y) {
  const auto* from = reinterpret_cast<const uint16_t*>(x);
  auto* to = reinterpret_cast<uint32_t*>(y);
  const int64_t pairs = depth / 2;
  for (int64_t o = 0; o < width; o += TILE)
    for (int64_t i = 0; i < pairs; i += TILE) {
      alignas(64) uint32_t tile[TILE * TILE];
      const int64_t some = std::min(TILE, width - o);
      for (int64_t v = 0; v < TILE; ++v) {
        const int64_t k = 2 * (i + v);
        const uint16_t *even = from + k * width + o, *odd = even + width;
        if (some == TILE && k + 1 < rows)
          for (int64_t j = 0; j < TILE; ++j) tile[v * TILE + j] = even[j] | uint32_t(odd[j]) << 16;
        else
          for (int64_t j = 0; j < TILE; ++j)
            tile[v * TILE + j] = j < some && k < rows ? even[j] | (k + 1 < rows ? uint32_t(odd[j]) << 16 : 0) : 0;
      }
      transpose(reinterpret_cast<const float*>(tile), TILE, reinterpret_cast<float*>(to + o * pairs + i), pairs, some);
    }
}

// sums (width) += all rows of g (rows, width)
void add_rows(int64_t rows, int64_t width, const Half* g, float* sums) {
  constexpr int64_t SOME = 4 * LANES;
  int64_t c = 0;
  for (; c + SOME <= width; c += SOME) {
    Lanes total[4] = {};
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < 4; ++v) total[v] += lanes_at(g + r * width + c + v * LANES);
    for (int v = 0; v < 4; ++v) *(Lanes*)(sums + c + v * LANES) += total[v];
  }
  for (; c < width; ++c)
    for (int64_t r = 0; r < rows; ++r) sums[c] += float(g[r * width + c]);
}

// sums (outs, ins) += g (rows, outs).T @ x (rows, ins), or, the first time, that alone
void add_products(const Step& step, int64_t rows, const Half* g, const Half* x, float* sums, bool first) {
  thread_local Room<Half> left_room, right_room;
  const int64_t depth = (rows + DEPTH - 1) / DEPTH * DEPTH;
  Half *left = left_room.of(step.c * depth), *packed = right_room.of(SUMMED_COLUMNS * depth);
  turn(g, rows, depth, step.c, left);
  for (int64_t p = 0; p < step.b; p += SUMMED_COLUMNS) {
    const Packing right{depth, std::min(SUMMED_COLUMNS, step.b - p)};
    pack_rows(right, x + p, step.b, rows, 0, right.width, packed);
    product(step.c, right, left, depth, packed, Sums{sums + p, right.width, step.b, !first});
  }
}

// Adds to the sums of factors that have any, from the last step back to `lowest`; x_grad may be null
void mix_back(const Segment& segment, int64_t n, const Half* g, const Half* x, float* const* sums, bool first, int64_t lowest,
              Half* x_grad) {
  const int64_t ins = segment.ins(), outs = segment.outs();
  int64_t read = 0, kept = 0;  // steps whose input is read, and numbers of these
  for (int64_t i = 0; i < segment.count; ++i)
    if (sums[i]) read = i + 1;
  for (int64_t i = 0; i < read; ++i) kept += segment.steps[i].ins();
  const Chunk chunk(segment, kept);
  for (int64_t t = 0; t < n; t += chunk.tokens) {
    const int64_t some = std::min(chunk.tokens, n - t);
    float* in = chunk.kept;
    const bool swaps = read > 1 && segment.steps->kind == SWAP;
    if (read && !swaps) widen(x + t * ins, in, some * ins);
    for (int64_t i = 0; i + 1 < read; ++i) {
      const Step& step = segment.steps[i];
      float* out = in + chunk.tokens * step.ins();
      if (i == 0 && swaps)
        for (int64_t k = 0; k < some; ++k) swap(x + (t + k) * ins, Written{out + k * ins}, step.a, step.b);
      else
        run(step, some, in, out, nullptr);
      in = out;
    }
    int which = 0;
    int64_t i = segment.count - 1;
    if (const Step& step = segment.steps[i]; step.kind == SWAP && i > lowest) {
      for (int64_t k = 0; k < some; ++k)
        swap(g + (t + k) * outs, Written{chunk.halves[which] + k * outs}, step.b, step.a);
      --i;
    } else {
      widen(g + t * outs, chunk.halves[which], some * outs);
    }
    for (; i >= lowest; --i) {
      const Step& step = segment.steps[i];
      if (i == 0 && x_grad && step.kind == SWAP) {
        for (int64_t k = 0; k < some; ++k)
          swap(chunk.halves[which] + k * ins, Rounded{x_grad + (t + k) * ins, nullptr}, step.b, step.a);
        break;
      }
      if (sums[i]) add_factor_gradient(step, some, chunk.halves[which], in, sums[i], first && t == 0);
      if (i < read && i > 0) in -= chunk.tokens * segment.steps[i - 1].ins();
      if (i == lowest && !x_grad) break;
      input_gradient(step, some, chunk.halves[which], segment.turned[i].data(), chunk.halves[1 - which]);
      which = 1 - which;
    }
    if (x_grad && segment.steps->kind != SWAP) narrow(chunk.halves[which], nullptr, x_grad + t * ins, some * ins);
  }
}

std::vector<at::Tensor> chain_backward(Chain& made, const at::Tensor& grad, const at::Tensor& x, at::TensorList factors,
                                       at::IntArrayRef needs) {
  const int64_t count_steps = made.steps.size(), cols = made.cols, rows = made.rows, n = x.numel() / cols;
  const Half *from = made.take<Half>(x, cols), *upstream = made.take<Half>(grad, rows);
  TORCH_CHECK(grad.numel() == n * rows, "compresskit: a gradient of ", n, " tokens is expected");
  const Wanted wanted(made, factors, needs);

  std::vector<Step> steps;
  std::vector<Segment> segments = segments_of(made, steps);
  std::vector<Right> rights(2 * segments.size());  // of each segment there and back; without a factor what is not needed
  thread_local std::vector<Room<Half>> shared;
  int64_t kept = 0, most = cols;
  for (size_t k = 0; k < segments.size(); ++k) {
    Segment& segment = segments[k];
    most = std::max({most, segment.ins(), segment.outs()});
    segment.at = kept;
    if (k > 0 && segment.first <= wanted.highest) kept += segment.ins();
    if (!segment.multiplies()) {
      for (int64_t i = 0; i < segment.count; ++i) {
        const Step& step = segment.steps[i];
        segment.turned.emplace_back(segment.small[i].size());
        if (step.kind == FIRST) swap(step.factor, segment.turned.back().data(), step.b, step.a);
      }
      continue;
    }
    const Step& step = *segment.steps;
    check_depth(step.b);
    check_depth(step.c);
    if (segment.first < wanted.highest) rights[2 * k] = {segment.factor, step.c, step.b, false};
    if (segment.first > wanted.lowest || needs[0]) rights[2 * k + 1] = {segment.factor, step.c, step.b, true};
    for (size_t i = 2 * k; i < 2 * k + 2; ++i)
      if (rights[i].factor) rights[i].share(at_least(shared, rights.size())[i]);
  }

  const int64_t rows_at_once = (SUMMED_ROWS + made.groups - 1) / made.groups;
  const int64_t block = std::min(n, (std::max(SUMMED_NUMBERS / (kept + 2 * most), rows_at_once) + DEPTH - 1) / DEPTH * DEPTH);
  const int64_t grain = std::max<int64_t>(1, GRAIN / (3 * work_of(made)));
  at::Tensor x_grad = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  Half* to = x_grad.mutable_data_ptr<Half>();
  const int sums_of = n <= grain ? 1 : at::get_num_threads();
  at::Tensor sums = at::empty({sums_of, wanted.size}, x.options().dtype(at::kFloat));
  float* all = sums.mutable_data_ptr<float>();
  std::vector<char> added(sums_of);

  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const int thread = sums_of == 1 ? 0 : at::get_thread_num();
    float* own = all + thread * wanted.size;
    added[thread] = true;
    wanted.clear(made, own);
    std::vector<float*> sum(count_steps, nullptr);
    for (int64_t i = 0; i < count_steps; ++i)
      if (made.factor_of[i] >= 0 && needs[2 + made.factor_of[i]]) sum[i] = own + wanted.offsets[made.factor_of[i]];
    thread_local Room<Half> room;
    thread_local std::vector<Room<Half>> own_rooms;
    std::vector<const Half*> right(rights.size());
    for (size_t i = 0; i < rights.size(); ++i)
      if (rights[i].factor) right[i] = rights[i].here(at_least(own_rooms, rights.size())[i]);
    Half* scratch = room.of(block * (kept + 2 * most));
    Half* halves[2] = {scratch + block * kept, scratch + block * (kept + most)};
    for (int64_t t = begin; t < end; t += block) {
      const int64_t count = std::min(block, end - t);
      const auto into = [&](const Segment& segment) -> Half* {
        return segment.first == 0 ? const_cast<Half*>(from) + t * cols : scratch + block * segment.at;
      };
      for (size_t k = 0; k + 1 < segments.size() && segments[k + 1].first <= wanted.highest; ++k) {
        const Segment& segment = segments[k];
        Half* out = into(segments[k + 1]);
        if (segment.multiplies())
          multiply_round(count * segment.steps->a, *segment.steps, into(segment), right[2 * k], nullptr, out);
        else
          mix_segment(segment, count, into(segment), nullptr, out);
      }
      const Half* g = upstream + t * rows;
      if (needs[1])
        add_rows(count, rows, g, own + wanted.bias_at);
      for (int64_t k = segments.size() - 1; k >= 0 && segments[k].first + segments[k].count > wanted.lowest; --k) {
        const Segment& segment = segments[k];
        const bool ends = segment.first <= wanted.lowest && !needs[0];
        Half* out = ends ? nullptr : segment.first == 0 ? to + t * cols : halves[k % 2];
        if (segment.multiplies()) {
          const Step& step = *segment.steps;
          if (sum[segment.first]) add_products(step, count * step.a, g, into(segment), sum[segment.first], t == begin);
          if (out) multiply_round(count * step.a, Step{LAST, step.a, step.c, step.b, nullptr}, g, right[2 * k + 1], nullptr, out);
        } else {
          const int64_t lowest = std::max<int64_t>(0, wanted.lowest - segment.first);
          mix_back(segment, count, g, into(segment), sum.data() + segment.first, t == begin, out ? 0 : lowest, out);
        }
        g = out;
      }
    }
    _tile_release();
  });
  return wanted.gradients(x_grad, sums, added, factors, needs);
}

}  // namespace half
#endif
