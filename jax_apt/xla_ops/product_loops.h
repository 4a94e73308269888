// The algorithm around a micro-kernel: lay out lhs and rhs, then multiply blocks and store the result.
//
// Included by each ISA unit inside its own anonymous namespace (hence no include guard, no system headers and
// no std:: templates), so that every unit compiles it with its own instructions. What is done where, and in
// which order, stands in the Plan (plan.h).
//
// A micro-kernel type describes itself:
//   Lhs, Rhs     packed element types: uint8_t and int8_t, or int16_t twice
//   kGroup       depth elements that one instruction multiplies and adds: 32 bits
//   kMr, kNr     rows and columns of its register block
//   Run(lhs, lhs_stride, segments, count, rhs, rows, is_first, tile)
//                tile[r * kNr + c] (+)= sum over the segments of lhs[r * lhs_stride + offset + k] * rhs[k][c]
//   Setup, Leave what a thread does before its first and after its last Run
//   Columns      a micro-kernel on the same panels that is quick for a single row

#include "packing.h"

template <class K>
class Driver {
 public:
  Driver(const Plan& plan, const Product& product, uint8_t* scratch)
      : p(plan), product(product), scratch(scratch) {}

  void Run(Parallel& parallel) {
    image_chunk =
        p.is_lhs_channels ? 4 * kPixelChunk : Max(kPixelChunk, kChunkBytes / Max(1, p.source_channels));
    image_tasks = p.is_lhs_direct ? 0 : Images() * p.lhs_limbs.count * CeilDiv(p.points, image_chunk);
    parallel.Run(
        image_tasks + RhsTasks(),
        [](void* self, int64_t task, int worker) { Self(self)->Prepare(task, worker); }, this);
    parallel.Run(
        static_cast<int64_t>(p.tasks.size()),
        [](void* self, int64_t task, int worker) { Self(self)->Multiply(task, worker); }, this);
  }

 private:
  using Lhs = typename K::Lhs;
  using Rhs = typename K::Rhs;
  static constexpr bool kIsBytes = sizeof(Lhs) == 1;
  static constexpr int64_t kTile = K::kMr * K::kNr;
  static constexpr int64_t kChunkBytes = 32768;

  const Plan& p;
  const Product& product;
  uint8_t* const scratch;
  int64_t image_chunk = 0, image_tasks = 0;

  static Driver* Self(void* self) { return static_cast<Driver*>(self); }

  int64_t Images() const { return static_cast<int64_t>(p.image_shift.size()) / kSpace; }
  int64_t Groups() const { return product.geometry.groups; }

  uint8_t* Worker(int worker) const { return scratch + p.worker_offset + worker * p.worker_bytes; }

  Lhs* LhsImage(int limb) const {
    return reinterpret_cast<Lhs*>(scratch + p.lhs_offset) + limb * p.lhs_elements;
  }

  const Lhs* LhsRows(int limb) const {
    if constexpr (kIsBytes)
      if (p.is_lhs_direct) return product.lhs.plane[limb];
    return LhsImage(limb);
  }

  uint8_t* Panel(int64_t group, const Phase& phase, int64_t panel) const {
    return scratch + p.rhs_offset + group * p.group_rhs_bytes + phase.rhs_bytes + panel * phase.panel_bytes;
  }

  Rhs* Words(uint8_t* panel, const Phase& phase, int limb) const {
    return reinterpret_cast<Rhs*>(panel + limb * LimbBytes(phase));
  }

  int64_t* DigitSums(uint8_t* panel, const Phase& phase) const {  // (blocks, kNr)
    return reinterpret_cast<int64_t*>(panel + p.rhs_limbs.count * LimbBytes(phase));
  }

  int64_t LimbBytes(const Phase& phase) const {
    return RoundUp(phase.depth * K::kNr * int64_t{sizeof(Rhs)}, 64);
  }

  // ---- Preparation

  int64_t RhsTasks() const {
    if (p.is_rhs_pixels) return p.phases[0].blocks;
    return Groups() * static_cast<int64_t>(p.phases.size()) * p.panels;
  }

  void Prepare(int64_t task, int worker) {
    if (task < image_tasks) return FillImage(task, worker);
    task -= image_tasks;
    if (p.is_rhs_pixels) return PackPixels(static_cast<int>(task), worker);
    const int64_t phases = static_cast<int64_t>(p.phases.size());
    PackPanel(task / p.panels / phases, p.phases[task / p.panels % phases], task % p.panels, worker);
  }

  void FillImage(int64_t task, int worker) {
    const int64_t chunks = CeilDiv(p.points, image_chunk), first = task % chunks * image_chunk;
    const int limb = static_cast<int>(task / chunks % p.lhs_limbs.count);
    const int64_t index = task / chunks / p.lhs_limbs.count, count = Min(image_chunk, p.points - first);
    const Image image{product.lhs,      p.grid, p.source, p.step, &p.image_shift[index * kSpace],
                      p.source_channels};
    const Limb which = p.lhs_limbs.limb[limb];
    if (!p.is_lhs_channels)
      return image.Fill(which, first, count, LhsImage(limb) + (index * p.points + first) * p.lhs_stride);
    auto* pixels = reinterpret_cast<Lhs*>(Worker(worker));
    for (int64_t i = 0; i < count; i += kPixelChunk) {
      const int64_t some = Min(kPixelChunk, count - i);
      image.Fill(which, first + i, some, pixels);
      Transpose(pixels, some, p.source_channels,
                LhsImage(limb) + index * p.source_channels * p.lhs_stride + first + i, p.lhs_stride);
    }
  }

  // A block of pixels of dy for all panels of all groups.
  void PackPixels(int block, int worker) {
    const Phase& phase = p.phases[0];
    const Block& b = p.blocks[phase.first_block + block];
    if (b.segments == 0) return ClearSums(block);
    const Segment& segment = p.segments[b.first_segment];
    const Geometry& g = product.geometry;
    constexpr int64_t kOne[kSpace] = {1, 1, 1}, kNone[kSpace] = {};
    const Image image{product.rhs, p.grid, p.result, kOne, kNone, g.out_channels};
    auto* pixels = reinterpret_cast<Lhs*>(Worker(worker));
    for (int limb = 0; limb < p.rhs_limbs.count; ++limb)
      for (int64_t k = 0; k < segment.depth; k += kPixelChunk) {
        const int64_t depth = Min(kPixelChunk, segment.depth - k);
        image.Fill(p.rhs_limbs.limb[limb], segment.lhs + k, depth, pixels);
        for (int64_t group = 0; group < Groups(); ++group)
          for (int64_t panel = 0; panel < p.panels; ++panel) {
            const Lhs* columns = pixels + group * p.rhs_group_step + panel * K::kNr;
            Rhs* words = Words(Panel(group, phase, panel), phase, limb) + b.rhs + k * K::kNr;
            const int64_t padded = Min(kPixelChunk, b.depth - k);
            PackRows([&](int64_t i) { return columns + i * g.out_channels; }, depth, padded, Width(panel),
                     words);
          }
      }
    for (int64_t group = 0; group < Groups(); ++group)
      for (int64_t panel = 0; panel < p.panels; ++panel) SumDigits(phase, block, Panel(group, phase, panel));
  }

  void ClearSums(int block) {
    for (int64_t group = 0; group < Groups(); ++group)
      for (int64_t panel = 0; panel < p.panels; ++panel)
        SumDigits(p.phases[0], block, Panel(group, p.phases[0], panel));
  }

  int64_t Width(int64_t panel) const { return Min(K::kNr, p.columns - panel * K::kNr); }

  void PackPanel(int64_t group, const Phase& phase, int64_t panel, int worker) {
    uint8_t* packed = Panel(group, phase, panel);
    const int64_t start = group * p.rhs_group_step + panel * K::kNr * p.rhs_lane_step;
    for (int limb = 0; limb < p.rhs_limbs.count; ++limb)
      for (int b = 0; b < phase.blocks; ++b) {
        const Block& block = p.blocks[phase.first_block + b];
        Rhs* words = Words(packed, phase, limb) + block.rhs;
        for (int s = 0; s < block.segments; ++s) {
          const Segment& segment = p.segments[block.first_segment + s];
          const int64_t padded = RoundUp(segment.depth, p.shape.depth_unit);
          if (p.is_rhs_along) {
            PackAlong(p.rhs_limbs.limb[limb], segment, start, padded, Width(panel), words,
                      reinterpret_cast<Lhs*>(Worker(worker)));
          } else {
            PackAcross(p.rhs_limbs.limb[limb], segment, start, padded, Width(panel), words);
          }
          words += padded * K::kNr;
        }
      }
    for (int b = 0; b < phase.blocks; ++b) SumDigits(phase, b, packed);
  }

  // Columns are neighbours in memory.
  void PackAcross(Limb limb, const Segment& segment, int64_t start, int64_t padded, int64_t width,
                  Rhs* words) const {
    const int64_t tap = segment.depth / segment.pieces;
    const Piece* pieces = &p.pieces[segment.first_piece];
    Lhs rows[K::kGroup][K::kNr];
    int64_t next = 0;
    const auto read = [&](int64_t k) -> const Lhs* {
      const int64_t at = start + pieces[k / tap].rhs + k % tap * p.rhs_depth_step;
      if constexpr (kIsBytes) return product.rhs.plane[limb.shift / 8] + at;
      Lhs* row = rows[next++ % K::kGroup];
      ReadLimb(product.rhs, limb, at, width, row);
      return row;
    };
    PackRows(read, segment.depth, padded, width, words);
  }

  // `row(k)` has the elements of depth k; each is read within its width alone.
  template <class Row>
  static void PackRows(Row row, int64_t depth, int64_t padded, int64_t width, Rhs* words) {
    Lhs zeros[K::kNr];
    for (Lhs& zero : zeros) zero = ZeroDigit(Lhs{});
    auto* out = reinterpret_cast<uint32_t*>(words);
    for (int64_t k = 0; k < padded; k += K::kGroup, out += K::kNr) {
      const Lhs* group[K::kGroup];
      for (int64_t j = 0; j < K::kGroup; ++j) group[j] = k + j < depth ? row(k + j) : zeros;
      if (width == K::kNr) {
        Interleave(group, K::kNr, out);
      } else {
        Interleave(group, width, out);
        for (int64_t c = width; c < K::kNr; ++c) out[c] = 0;
      }
    }
  }

  // The depth is contiguous in memory.
  void PackAlong(Limb limb, const Segment& segment, int64_t start, int64_t padded, int64_t width, Rhs* words,
                 Lhs* column) const {
    const int64_t tap = segment.depth / segment.pieces;
    auto* out = reinterpret_cast<uint32_t*>(words);
    for (int64_t k = segment.depth; k < padded; ++k) column[k] = ZeroDigit(Lhs{});
    for (int64_t c = 0; c < K::kNr; ++c) {
      if (c >= width) {
        for (int64_t g = 0; g < padded / K::kGroup; ++g) out[g * K::kNr + c] = 0;
        continue;
      }
      for (int i = 0; i < segment.pieces; ++i)
        ReadLimb(product.rhs, limb, start + c * p.rhs_lane_step + p.pieces[segment.first_piece + i].rhs, tap,
                 column + i * tap);
      for (int64_t g = 0; g < padded / K::kGroup; ++g) out[g * K::kNr + c] = Word(column + g * K::kGroup);
    }
  }

  // Sum over the limbs of 256^limb times the column sums of a block's digits: a product with a row of ones.
  void SumDigits(const Phase& phase, int block, uint8_t* panel) const {
    if constexpr (kIsBytes) {
      const Block& b = p.blocks[phase.first_block + block];
      int64_t* sums = DigitSums(panel, phase) + block * K::kNr;
      for (int64_t c = 0; c < K::kNr; ++c) sums[c] = 0;
      constexpr int64_t kOnes = 1024;
      Lhs ones[kOnes + 64];
      __builtin_memset(ones, 1, sizeof(ones));
      alignas(64) int32_t row[K::kNr * K::Columns::kMr] = {};
      for (int limb = 0; limb < p.rhs_limbs.count; ++limb) {
        const Rhs* words = Words(panel, phase, limb) + b.rhs;
        for (int64_t k = 0; k < b.depth; k += kOnes) {
          const Segment segment{0, Min(kOnes, b.depth - k), 0, 0};
          K::Columns::Run(ones, 0, &segment, 1, words + k * K::kNr, 1, k == 0, row);
        }
        if (b.depth > 0)
          for (int64_t c = 0; c < K::kNr; ++c) sums[c] += int64_t{row[c]} * (int64_t{1} << (8 * limb));
      }
    }
  }

  // ---- Multiplication

  // Where the sums of a task are kept: for each pair of limbs int32, then 64 bits.
  struct Sums {
    int32_t* narrow;
    int64_t* wide;
  };

  Sums SumsAt(int worker, int64_t slot) const {
    const int64_t pairs = p.lhs_limbs.count * p.rhs_limbs.count;
    const int64_t bytes = kTile * (4 * pairs + (p.is_wide ? 8 : 0));
    uint8_t* at = Worker(worker) + p.temporary_bytes + slot * bytes;
    return {reinterpret_cast<int32_t*>(at), reinterpret_cast<int64_t*>(at + 4 * pairs * kTile)};
  }

  void Multiply(int64_t index, int worker) {
    const Task& task = p.tasks[index];
    const Phase& phase = p.phases[task.phase];
    K::Setup();
    for (int b = 0; b < phase.blocks; ++b)                     // blocks of the depth
      for (int64_t panel = 0; panel < task.panels; ++panel) {  // panels of columns
        const Corrections corrections(*this, task, phase, task.first_panel + panel, b + 1 == phase.blocks);
        int run = FindRun(phase, task.first_tile);
        for (int64_t tile = 0; tile < task.tiles; ++tile) {  // register blocks of rows
          while (run + 1 < phase.first_run + phase.runs && p.runs[run + 1].tile <= task.first_tile + tile)
            ++run;
          const int64_t slot = p.is_single_block ? 0 : tile * task.panels + panel;
          const int64_t row = (task.first_tile + tile - p.runs[run].tile) * K::kMr;
          MultiplyTile(task, phase, b, task.first_panel + panel, p.runs[run], row, SumsAt(worker, slot),
                       corrections);
        }
      }
    K::Leave();
  }

  int FindRun(const Phase& phase, int64_t tile) const {
    int low = phase.first_run, high = phase.first_run + phase.runs;  // low's first tile is not beyond
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (p.runs[middle].tile <= tile ? low : high) = middle;
    }
    return low;
  }

  // What the offsets of bytes call for, per column; see packing.h.
  struct Corrections {
    int64_t column[K::kNr];
    int32_t narrow[K::kNr];
    int64_t rest = 0;  // times the row sums

    Corrections(const Driver& d, const Task& task, const Phase& phase, int64_t panel, bool is_used) {
      if constexpr (kIsBytes) {
        if (!is_used) return;
        const int64_t* sums = d.DigitSums(d.Panel(task.group, phase, panel), phase);
        const int64_t offset = int64_t{128} << (8 * (d.p.lhs_limbs.count - 1));
        for (int64_t c = 0; c < K::kNr; ++c) {
          int64_t sum = 0;
          for (int b = 0; b < phase.blocks; ++b) sum += sums[b * K::kNr + c];
          column[c] = offset * sum;
          narrow[c] = static_cast<int32_t>(column[c]);
        }
        for (int limb = 0; limb + 1 < d.p.rhs_limbs.count; ++limb) rest += int64_t{128} << (8 * limb);
      }
    }
  };

  void MultiplyTile(const Task& task, const Phase& phase, int b, int64_t panel, const RowRun& run,
                    int64_t row, Sums sums, const Corrections& corrections) const {
    const Block& block = p.blocks[phase.first_block + b];
    const bool is_first = b == 0 || p.blocks[phase.first_block + b - 1].is_last;
    const int64_t start = task.group * p.lhs_group_step + run.lhs + row * p.lhs_stride;
    const int rows = static_cast<int>(Min(K::kMr, run.rows - row));
    uint8_t* packed = Panel(task.group, phase, panel);
    const Segment* segments = p.segments.data() + block.first_segment;
    int32_t* tile = sums.narrow;
    for (int i = 0; i < p.lhs_limbs.count; ++i)  // pairs of limbs
      for (int j = 0; j < p.rhs_limbs.count; ++j, tile += kTile)
        K::Run(LhsRows(i) + start, p.lhs_stride, segments, block.segments,
               Words(packed, phase, j) + block.rhs, rows, is_first, tile);
    if (!block.is_last) return;
    const bool is_done = b + 1 == phase.blocks;
    if (p.is_wide) Widen(sums, rows, b == FirstLast(phase));
    if (!is_done) return;
    float* out[K::kMr];
    FindRows(phase, run, row, rows, out);
    const int64_t column = task.group * p.out_group_step + panel * K::kNr;
    if (p.is_wide) {
      int64_t row_sums[K::kMr] = {};
      if (corrections.rest != 0) SumRows(phase, start, rows, row_sums);
      StoreWide(sums.wide, rows, Width(panel), column, corrections, row_sums, out);
    } else {
      StoreNarrow(sums.narrow, rows, Width(panel), column, corrections, out);
    }
  }

  int FirstLast(const Phase& phase) const {  // the first block whose sums leave int32
    int b = 0;
    while (!p.blocks[phase.first_block + b].is_last) ++b;
    return b;
  }

  void Widen(Sums sums, int rows, bool is_first) const {
    const int32_t* narrow = sums.narrow;
    for (int i = 0; i < p.lhs_limbs.count; ++i)
      for (int j = 0; j < p.rhs_limbs.count; ++j, narrow += kTile) {
        const int shift = p.lhs_limbs.limb[i].shift + p.rhs_limbs.limb[j].shift;
        const bool is_set = is_first && i == 0 && j == 0;
        int64_t* wide = sums.wide;
        for (int64_t c = 0; c < rows * K::kNr; ++c) {  // an unsigned shift: a negative one is undefined
          const auto term = static_cast<int64_t>(static_cast<uint64_t>(int64_t{narrow[c]}) << shift);
          wide[c] = is_set ? term : wide[c] + term;
        }
      }
  }

  // Sums of the codes of lhs, where they are bytes.
  void SumRows(const Phase& phase, int64_t start, int rows, int64_t* sums) const {
    if constexpr (kIsBytes) {
      const int64_t offset = int64_t{128} << (8 * (p.lhs_limbs.count - 1));
      for (int b = 0; b < phase.blocks; ++b) {
        const Block& block = p.blocks[phase.first_block + b];
        for (int s = 0; s < block.segments; ++s) {
          const Segment& segment = p.segments[block.first_segment + s];
          for (int r = 0; r < rows; ++r) {
            sums[r] -= offset * segment.depth;
            for (int i = 0; i < p.lhs_limbs.count; ++i)
              sums[r] += SumBytes(LhsRows(i) + start + r * p.lhs_stride + segment.lhs, segment.depth)
                         << (8 * i);
          }
        }
      }
    }
  }

  static int64_t SumBytes(const Lhs* bytes, int64_t count) {
    uint32_t sum = 0;  // of at most 2^24 bytes
    for (int64_t i = 0; i < count; ++i) sum += bytes[i];
    return sum;
  }

  // ---- Storing

  // Rows of the result, null for a grid point that is none.
  void FindRows(const Phase& phase, const RowRun& run, int64_t row, int rows, float** out) const {
    if (p.is_lhs_channels) {
      for (int r = 0; r < rows; ++r) out[r] = product.out + (run.place * run.rows + row + r) * p.out_row;
      return;
    }
    const int64_t first = (phase.low[0] * p.grid[1] + phase.low[1]) * p.grid[2] + phase.low[2] + row;
    int64_t x = first % p.grid[2], y = first / p.grid[2] % p.grid[1], z = first / p.grid[2] / p.grid[1];
    for (int r = 0; r < rows; ++r) {
      const bool is_pixel =
          x >= phase.low[2] && x <= phase.high[2] && y >= phase.low[1] && y <= phase.high[1];
      const int64_t pixel = ((run.place * p.result[0] + z * phase.scale[0] + phase.shift[0]) * p.result[1] +
                             y * phase.scale[1] + phase.shift[1]) *
                                p.result[2] +
                            x * phase.scale[2] + phase.shift[2];
      out[r] = is_pixel ? product.out + pixel * p.out_row : nullptr;
      if (++x == p.grid[2]) x = 0, ++y;
      if (y == p.grid[1]) y = 0, ++z;
    }
  }

  // Powers of two multiply exactly; the smaller first keeps both steps within float32's range.
  float LowScale() const { return PowerOfTwo(Min(product.lhs.exponent, product.rhs.exponent)); }
  float HighScale() const { return PowerOfTwo(Max(product.lhs.exponent, product.rhs.exponent)); }

  void StoreNarrow(const int32_t* sums, int rows, int64_t width, int64_t column,
                   const Corrections& corrections, float* const* out) const {
    const float low = LowScale(), high = HighScale();
    const auto store = [&](int64_t columns) {
      for (int r = 0; r < rows; ++r) {
        if (out[r] == nullptr) continue;
        float* to = out[r] + column;
        const int32_t* from = sums + r * K::kNr;
        for (int64_t c = 0; c < columns; ++c) {  // modulo 2^32: only the final sum must fit
          uint32_t sum = static_cast<uint32_t>(from[c]);
          if constexpr (kIsBytes) sum -= static_cast<uint32_t>(corrections.narrow[c]);
          to[c] = static_cast<float>(static_cast<int32_t>(sum)) * low * high;
        }
      }
    };
    if (width == K::kNr) return store(K::kNr);
    store(width);
  }

  void StoreWide(const int64_t* sums, int rows, int64_t width, int64_t column, const Corrections& corrections,
                 const int64_t* row_sums, float* const* out) const {
    const float low = LowScale(), high = HighScale();
    for (int r = 0; r < rows; ++r) {
      if (out[r] == nullptr) continue;
      const int64_t row = corrections.rest * row_sums[r];
      for (int64_t c = 0; c < width; ++c) {
        const int64_t sum = sums[r * K::kNr + c] + row - (kIsBytes ? corrections.column[c] : 0);
        out[r][column + c] = static_cast<float>(sum) * low * high;
      }
    }
  }
};

#include "depthwise_loops.h"
#include "pool_loops.h"

template <class K>
void RunProduct(const Plan& plan, const Product& product, uint8_t* scratch, Parallel& parallel) {
  if (plan.is_depthwise) return RunDepthwise(plan, product, scratch, parallel);
  Driver<K>(plan, product, scratch).Run(parallel);
}

// ---- Quantization ----------------------------------------------------------------------------------------

// Clips in float, since conversion turns large values into INT_MIN; rounds half to even, as the processor
// does unless told otherwise.
template <int kLimbs>
int64_t QuantizeInto(const float* __restrict x, int64_t count, int bits, int exponent,
                     uint8_t* __restrict planes, int64_t stride) {
  const float inverse = PowerOfTwo(-exponent), limit = static_cast<float>((int64_t{1} << (bits - 1)) - 1);
  constexpr int32_t kOffset = 1 << (8 * kLimbs - 1);
  int64_t bad = 0;
  constexpr int64_t kRun = 4096;
  for (int64_t start = 0; start < count; start += kRun) {
    int32_t some = 0;
    const int64_t end = Min(count, start + kRun);
    for (int64_t i = start; i < end; ++i) {
      const float value = x[i];
      float scaled = value * inverse;
      scaled = scaled < limit ? scaled : limit;
      scaled = scaled > -limit ? scaled : -limit;
      const bool is_bad = !(__builtin_fabsf(value) <= 3.4028234663852886e38f);
      int32_t code = static_cast<int32_t>(__builtin_rintf(scaled)) + kOffset;
      code = is_bad ? 0 : code;
      some += is_bad;
      planes[i] = static_cast<uint8_t>(code);
      if (kLimbs > 1) planes[stride + i] = static_cast<uint8_t>(code >> 8);
      if (kLimbs > 2) planes[2 * stride + i] = static_cast<uint8_t>(code >> 16);
    }
    bad += some;
  }
  return bad;
}

int64_t Quantize(const float* x, int64_t count, int bits, int exponent, uint8_t* planes, int64_t stride) {
  switch (LimbCount(bits)) {
    case 1: return QuantizeInto<1>(x, count, bits, exponent, planes, stride);
    case 2: return QuantizeInto<2>(x, count, bits, exponent, planes, stride);
    default: return QuantizeInto<3>(x, count, bits, exponent, planes, stride);
  }
}

// ---- What the unit offers --------------------------------------------------------------------------------

template <class K>
constexpr Kernels KernelsOf(const char* name) {
  constexpr KernelShape kShape = {K::kMr, K::kNr, K::kRowUnit, K::kDepthUnit, sizeof(typename K::Lhs),
                                  K::kKc};
  return {name, kShape, RunProduct<K>, Quantize, MaxPoolGradient};
}
