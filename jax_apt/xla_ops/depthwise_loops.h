// Depthwise convolution: each channel has a filter of its own, so there is no matrix product to speak of.
//
// Included by unit.h inside each ISA unit's own anonymous namespace. All loops run along the
// channels, which are neighbours in memory. A row of lhs is rewritten once as words of neighbours along the
// row (depthwise_words.h) and held for all rows of the result that meet it:
//
//   forward, input gradient   a word holds what some taps of a row of the filter meet at one pixel
//   filter gradient           a word holds what one tap meets at successive pixels of dy
//
// The rows of a block of channels stay in L1. What is where stands in the DepthwisePlan.

#include "depthwise_words.h"

template <class P>
class Depthwise {
 public:
  Depthwise(const DepthwisePlan& plan, const Product& product, uint8_t* scratch)
      : p(plan), product(product), g(product.geometry), scratch(scratch) {}

  void Run(Parallel& parallel) {
    __builtin_memset(scratch + p.zeros_at, 0, p.padded);
    __builtin_memset(scratch + p.zeros_at + p.padded, 128, p.padded);
    const int64_t tasks = g.batch * p.pixels[0] * p.row_tasks * p.stretches * p.block_tasks;
    if (product.kind != Kind::kFilterGradient) {
      PackFilter();
      parallel.Run(
          tasks, [](void* self, int64_t task, int worker) { Self(self)->Gather(task, worker); }, this);
      return;
    }
    for (int w = 0; w < parallel.workers(); ++w)
      __builtin_memset(Totals(w), 0, Taps() * p.padded * sizeof(int64_t));
    parallel.Run(tasks, [](void* self, int64_t task, int worker) { Self(self)->AddUp(task, worker); }, this);
    StoreTotals(parallel.workers());
  }

 private:
  using Vector = typename P::Vector;
  using Sum = typename P::Sum;
  static constexpr int kVectors = kVectorBytes == 64 ? 1 : 2;  // as registers allow
  static constexpr int64_t kLanes = kVectors * P::kLanes;      // channels at once
  static constexpr uint32_t kOnes = 0x01010101;

  const DepthwisePlan& p;
  const Product& product;
  const Geometry& g;
  uint8_t* const scratch;

  static Depthwise* Self(void* self) { return static_cast<Depthwise*>(self); }

  int64_t FilterRows() const { return g.window[0] * g.window[1]; }
  int64_t Columns() const { return static_cast<int64_t>(p.is_needed.size()); }
  int64_t Taps() const { return FilterRows() * g.window[2]; }

  struct Scale {  // two powers of two: their product might leave float32's range
    float low, high;
  };

  Scale ScaleOf() const {
    return {PowerOfTwo(Min(product.lhs.exponent, product.rhs.exponent)),
            PowerOfTwo(Max(product.lhs.exponent, product.rhs.exponent))};
  }

  // Where words of a block's channel begin, of rows of `count` words.
  static int64_t LaneOf(int64_t channel, int64_t count) {
    return channel / kChannelUnit * count * kChannelUnit + channel % kChannelUnit;
  }

  uint8_t* Worker(int worker) const { return scratch + p.worker_at + worker * p.worker_bytes; }
  uint32_t* HeldRow(int worker, int64_t slot) const {
    return reinterpret_cast<uint32_t*>(Worker(worker)) + slot * p.row_words;
  }
  uint32_t* DyWords(int worker) const { return reinterpret_cast<uint32_t*>(Worker(worker) + p.dy_at); }
  Sum* Sums(int worker) const { return reinterpret_cast<Sum*>(Worker(worker) + p.sums_at); }
  int64_t* Totals(int worker) const { return reinterpret_cast<int64_t*>(Worker(worker) + p.totals_at); }

  uint32_t* FilterWords(int64_t taps, int64_t row) const {
    return reinterpret_cast<uint32_t*>(scratch) + (taps * FilterRows() + row) * p.padded;
  }
  uint32_t* Offsets(int64_t phase, int64_t row) const {
    return reinterpret_cast<uint32_t*>(scratch + p.offset_at) + (phase * FilterRows() + row) * p.padded;
  }

  // ---- Operands

  CodeRow RowOf(const Operand& operand, int64_t start, int64_t width) const {
    CodeRow row{{}, {}, width, g.in_channels};
    const int limbs = LimbCount(operand.bits);
    for (int i = 0; i < limbs; ++i) {
      row.plane[i] = operand.plane[i] + start;
      row.zeros[i] = scratch + p.zeros_at + (i + 1 == limbs ? p.padded : 0);
    }
    return row;
  }

  void PackFilter() const {
    const CodeRow row = RowOf(product.rhs, 0, Taps());
    for (int64_t w = 0; w < static_cast<int64_t>(p.taps.size()); ++w)
      for (int64_t r = 0; r < FilterRows(); ++r) {
        int64_t pixels[P::kGroup];
        for (int64_t k = 0; k < P::kGroup; ++k)
          pixels[k] = p.taps[w].tap[k] < 0 ? -1 : r * g.window[2] + p.taps[w].tap[k];
        PackPixels<P>(LimbCount(product.rhs.bits), row, pixels, g.in_channels, FilterWords(w, r));
      }
    if constexpr (P::kHasOffset)
      for (int64_t f = 0; f < static_cast<int64_t>(p.phases.size()); ++f)
        for (int64_t r = 0; r < FilterRows(); ++r) SetOffsets(f, r);
  }

  void SetOffsets(int64_t phase, int64_t row) const {
    uint32_t* offsets = Offsets(phase, row);
    for (int64_t c = 0; c < p.padded; c += P::kLanes) {
      Vector sum{};
      for (int w = 0; w < p.phases[phase].taps; ++w)
        sum = P::MultiplyAdd(sum, Vector{} + kOnes,
                             P::Load(FilterWords(p.phases[phase].first_taps + w, row) + c));
      sum *= -uint32_t{128};
      __builtin_memcpy(offsets + c, &sum, sizeof sum);
    }
  }

  // ---- Tasks

  struct Tile {
    int64_t n, z, first_row, rows, first_pixel, first_block, blocks;
  };

  Tile TileOf(int64_t task) const {
    const int64_t block = task % p.block_tasks, stretch = task / p.block_tasks % p.stretches;
    task /= p.block_tasks * p.stretches;
    const int64_t first_row = task % p.row_tasks * p.rows;
    task /= p.row_tasks;
    const int64_t first = p.blocks * block / p.block_tasks, end = p.blocks * (block + 1) / p.block_tasks;
    return {task / p.pixels[0],  task % p.pixels[0],
            first_row,           Min(p.rows, p.pixels[1] - first_row),
            stretch * p.stretch, first,
            end - first};
  }

  struct Block {  // channels whose rows are held
    int64_t channel, channels;
    const uint32_t* row[kMaxTaps];  // words that each row of the filter meets, or null
    int64_t held[kMaxHeldRows];     // number of the row in each place
  };

  void StartBlock(int64_t number, Block& block) const {
    block.channel = number * p.block;
    block.channels = Min(p.block, g.in_channels - block.channel);
    for (int64_t i = 0; i < g.window[0] * p.held_rows; ++i) block.held[i] = -1;
  }

  // Position of lhs that pixel `at` of the result (or of dy) meets at a tap, or -1.
  int64_t Meets(int d, int64_t at, int64_t tap) const {
    int64_t place;
    if (product.kind == Kind::kInputGradient) {
      place = at + g.pad[d] - tap * g.dilation[d];
      if (place % g.stride[d] != 0) return -1;
      place /= g.stride[d];
    } else {
      place = at * g.stride[d] + tap * g.dilation[d] - g.pad[d];
    }
    return place >= 0 && place < p.source[d] ? place : -1;
  }

  // Finds the rows that row y meets and reads those that are not held yet.
  void HoldRows(const Tile& tile, int64_t y, int worker, Block& block) const {
    for (int64_t r = 0; r < FilterRows(); ++r) {
      const int64_t tap_z = r / g.window[1], tap_y = r % g.window[1];
      const int64_t from_z = Meets(0, tile.z, tap_z), from_y = Meets(1, y, tap_y);
      block.row[r] = nullptr;
      if (from_z < 0 || from_y < 0) continue;
      const int64_t slot = tap_z * p.held_rows + (p.is_ring ? from_y % p.held_rows : tap_y);
      uint32_t* words = HeldRow(worker, slot);
      block.row[r] = words;
      if (block.held[slot] == from_y) continue;
      block.held[slot] = from_y;
      const int64_t start = ((tile.n * p.source[0] + from_z) * p.source[1] + from_y) * p.source[2];
      const WordGrid grid{
          p.first_column + tile.first_pixel * p.stride, Columns(), 1, p.spacing, p.is_needed.data(), false};
      const CodeRow row = RowOf(product.lhs, start * g.in_channels, p.source[2]);
      const int limbs = LimbCount(product.lhs.bits);
      PackRow<P>(limbs, row, grid, {block.channel, block.channels, words});
    }
  }

  // ---- Forward and input gradient

  void Gather(int64_t task, int worker) const {
    const Tile tile = TileOf(task);
    Block block;
    for (int64_t b = 0; b < tile.blocks; ++b) {
      StartBlock(tile.first_block + b, block);
      for (int64_t y = tile.first_row; y < tile.first_row + tile.rows; ++y) {
        HoldRows(tile, y, worker, block);
        const int64_t line = ((tile.n * p.pixels[0] + tile.z) * p.pixels[1] + y) * p.pixels[2];
        for (int64_t f = 0; f < static_cast<int64_t>(p.phases.size()); ++f)
          GatherPhase(tile, f, block, product.out + line * g.in_channels);
      }
    }
  }

  struct Terms {  // of a pixel's sum: words of lhs, at pixel 0, times words of the filter
    int count;
    const uint32_t *lhs[kMaxTaps], *rhs[kMaxTaps];
  };

  // What a row's pixels of one phase gather from the rows that are held.
  void GatherPhase(const Tile& tile, int64_t f, const Block& block, float* line) const {
    const PixelPhase& phase = p.phases[f];
    const int64_t pixels = Min(p.stretch, phase.count - tile.first_pixel);
    Terms terms;
    terms.count = 0;
    for (int64_t r = 0; r < FilterRows(); ++r)
      for (int w = phase.first_taps; w < phase.first_taps + phase.taps && block.row[r] != nullptr; ++w) {
        terms.lhs[terms.count] = block.row[r] + (p.taps[w].offset - p.first_column) * kChannelUnit;
        terms.rhs[terms.count++] = FilterWords(w, r) + block.channel;
      }
    float* out = line + (phase.first + tile.first_pixel * p.step) * g.in_channels + block.channel;
    for (int64_t c = 0; c < block.channels; c += kLanes) {
      Vector start[kVectors] = {};
      if constexpr (P::kHasOffset)
        for (int64_t r = 0; r < FilterRows(); ++r)
          for (int v = 0; v < kVectors && block.row[r] != nullptr; ++v)
            start[v] += P::Load(Offsets(f, r) + block.channel + c + v * P::kLanes);
      GatherLanes(terms, start, pixels, c, Min(kLanes, block.channels - c), out + c);
    }
  }

  void GatherLanes(const Terms& terms, const Vector* start, int64_t pixels, int64_t c, int64_t lanes,
                   float* out) const {
    constexpr int kPixels = 4;
    const Scale scale = ScaleOf();
    const int64_t step = p.stride * kChannelUnit, out_step = p.step * g.in_channels;
    int64_t lane = LaneOf(c, Columns()), i = 0;
    for (; i + kPixels <= pixels; i += kPixels, lane += kPixels * step, out += kPixels * out_step)
      GatherPixels<kPixels>(terms, start, lane, c, step, scale, lanes, out, out_step);
    for (; i < pixels; ++i, lane += step, out += out_step)
      GatherPixels<1>(terms, start, lane, c, step, scale, lanes, out, out_step);
  }

  template <int kPixels>
  static void GatherPixels(const Terms& terms, const Vector* start, int64_t lane, int64_t c, int64_t step,
                           Scale scale, int64_t lanes, float* out, int64_t out_step) {
    Vector sums[kPixels][kVectors];
    for (int i = 0; i < kPixels; ++i)
      for (int v = 0; v < kVectors; ++v) sums[i][v] = start[v];
    for (int t = 0; t < terms.count; ++t) {
      const uint32_t* lhs = terms.lhs[t] + lane;
      Vector rhs[kVectors];
      for (int v = 0; v < kVectors; ++v) rhs[v] = P::Load(terms.rhs[t] + c + v * P::kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          sums[i][v] = P::MultiplyAdd(sums[i][v], P::Load(lhs + i * step + v * P::kLanes), rhs[v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) StoreLanes(sums[i], scale, lanes, out + i * out_step);
  }

  static void StoreLanes(const Vector* sums, Scale scale, int64_t lanes, float* out) {
    if (lanes == kLanes) {
      for (int v = 0; v < kVectors; ++v) P::Store(sums[v], scale.low, scale.high, out + v * P::kLanes);
      return;
    }
    float values[kLanes];
    for (int v = 0; v < kVectors; ++v) P::Store(sums[v], scale.low, scale.high, values + v * P::kLanes);
    for (int64_t i = 0; i < lanes; ++i) out[i] = values[i];
  }

  // ---- Filter gradient

  void AddUp(int64_t task, int worker) const {
    const Tile tile = TileOf(task);
    Block block;
    for (int64_t b = 0; b < tile.blocks; ++b) {
      StartBlock(tile.first_block + b, block);
      int64_t terms = 0;  // in the sums
      for (int64_t y = tile.first_row; y < tile.first_row + tile.rows; ++y) {
        const int64_t pixels = Min(p.stretch, p.pixels[2] - tile.first_pixel);
        if (terms + pixels > p.safe_terms) Flush(worker, block), terms = 0;
        if (terms == 0) __builtin_memset(Sums(worker), 0, Taps() * p.block * sizeof(Sum));
        terms += pixels;
        HoldRows(tile, y, worker, block);
        AddRow(tile, y, pixels, worker, block);
      }
      Flush(worker, block);
    }
  }

  void Flush(int worker, const Block& block) const {
    using Signed = decltype(SignedOf(Sum{}));
    for (int64_t t = 0; t < Taps(); ++t) {
      const Sum* sums = Sums(worker) + t * p.block;
      int64_t* totals = Totals(worker) + t * p.padded + block.channel;
      for (int64_t c = 0; c < block.channels; ++c) totals[c] += static_cast<Signed>(sums[c]);
    }
  }

  static int32_t SignedOf(uint32_t);
  static int64_t SignedOf(uint64_t);

  // Adds what a row of dy and the rows of x that it meets give to every tap.
  void AddRow(const Tile& tile, int64_t y, int64_t pixels, int worker, const Block& block) const {
    const int64_t start = ((tile.n * p.pixels[0] + tile.z) * p.pixels[1] + y) * p.pixels[2];
    const CodeRow row = RowOf(product.rhs, start * g.in_channels, tile.first_pixel + pixels);
    const WordGrid grid{tile.first_pixel, CeilDiv(pixels, P::kGroup), P::kGroup, 1, nullptr, true};
    uint32_t* dy = DyWords(worker);
    PackRow<P>(LimbCount(product.rhs.bits), row, grid, {block.channel, block.channels, dy});
    for (int64_t c = 0; c < block.channels; c += kLanes) {
      Vector start[kVectors] = {};
      if constexpr (P::kHasOffset)
        for (int v = 0; v < kVectors; ++v)
          start[v] = OffsetOf(dy + LaneOf(c + v * P::kLanes, grid.count), grid.count);
      AddTaps(block, c, dy + LaneOf(c, grid.count), grid.count, start, Sums(worker) + c);
    }
  }

  Vector OffsetOf(const uint32_t* dy, int64_t words) const {
    Vector sum{};
    for (int64_t i = 0; i < words; ++i)
      sum = P::MultiplyAdd(sum, Vector{} + kOnes, P::Load(dy + i * kChannelUnit));
    return sum * -uint32_t{128};
  }

  struct MetTaps {
    int count;
    const uint32_t* words[kMaxTaps];  // that a tap meets at pixel 0
    Sum* sums[kMaxTaps];
  };

  void AddTaps(const Block& block, int64_t c, const uint32_t* dy, int64_t words, const Vector* start,
               Sum* sums) const {
    constexpr int kMany = kVectors == 1 ? 9 : 3;  // enough that none waits for its own last sum
    MetTaps taps;
    taps.count = 0;
    for (int64_t t = 0; t < Taps(); ++t) {
      const uint32_t* row = block.row[t / g.window[2]];
      if (row == nullptr) continue;
      const int64_t offset = p.taps[t % g.window[2]].offset - p.first_column;
      taps.words[taps.count] = row + LaneOf(c, Columns()) + offset * kChannelUnit;
      taps.sums[taps.count++] = sums + t * p.block;
    }
    int t = 0;
    for (; t + kMany <= taps.count; t += kMany) AddTaps<kMany>(taps, t, dy, words, start);
    for (; t + 3 <= taps.count; t += 3) AddTaps<3>(taps, t, dy, words, start);
    for (; t < taps.count; ++t) AddTaps<1>(taps, t, dy, words, start);
  }

  template <int kTaps>
  void AddTaps(const MetTaps& taps, int first, const uint32_t* dy, int64_t words, const Vector* start) const {
    Vector sums[kTaps][kVectors];
    const uint32_t* from[kTaps];
    for (int t = 0; t < kTaps; ++t) {
      from[t] = taps.words[first + t];
      for (int v = 0; v < kVectors; ++v)
        sums[t][v] = LoadVector<Vector>(taps.sums[first + t] + v * P::kLanes) + start[v];
    }
    const int64_t step = P::kGroup * p.stride * kChannelUnit;
    for (int64_t i = 0, at = 0; i < words; ++i, at += step) {
      Vector rhs[kVectors];
      for (int v = 0; v < kVectors; ++v) rhs[v] = P::Load(dy + i * kChannelUnit + v * P::kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          sums[t][v] = P::MultiplyAdd(sums[t][v], P::Load(from[t] + at + v * P::kLanes), rhs[v]);
    }
    for (int t = 0; t < kTaps; ++t)
      for (int v = 0; v < kVectors; ++v)
        __builtin_memcpy(taps.sums[first + t] + v * P::kLanes, &sums[t][v], sizeof(Vector));
  }

  void StoreTotals(int workers) const {
    const Scale scale = ScaleOf();
    for (int64_t t = 0; t < Taps(); ++t)
      for (int64_t c = 0; c < g.in_channels; ++c) {
        int64_t total = 0;
        for (int w = 0; w < workers; ++w) total += Totals(w)[t * p.padded + c];
        product.out[t * g.in_channels + c] = static_cast<float>(total) * scale.low * scale.high;
      }
  }
};

void RunDepthwise(const Plan& plan, const Product& product, uint8_t* scratch, Parallel& parallel) {
  const DepthwisePlan& p = plan.depthwise;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
  if (p.group == ByteWords::kGroup) return Depthwise<ByteWords>(p, product, scratch).Run(parallel);
#endif
  if (p.group == PairWords::kGroup) return Depthwise<PairWords>(p, product, scratch).Run(parallel);
  Depthwise<WideWords>(p, product, scratch).Run(parallel);
}
