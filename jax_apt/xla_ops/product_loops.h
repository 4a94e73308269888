// The algorithm around a micro-kernel: lay out lhs and rhs, then multiply blocks and store the result.
//
// Included by unit.h. What is done where, and in which order, stands in the Plan (plan.h).
//
// A micro-kernel type describes itself:
//   Lhs, Rhs     packed element types: uint8_t and int8_t, or int16_t twice
//   kGroup       depth elements that one instruction multiplies and adds: 32 bits
//   kMr, kNr     rows and columns of its register block
//   Run(lhs, lhs_stride, segments, count, rhs, rows, is_first, tile)
//                tile[r * kNr + c] (+)= sum over the segments of lhs[r * lhs_stride + offset + k] * rhs[k][c]
//   Setup, Leave what a thread does before its first and after its last Run
//   Columns      a micro-kernel on the same panels that is quick for a single row
//   Apart, HasLargePair   if it kSaturates: one that does not, and whether it may on a row of words

#include "packing.h"
#include "quantize_loops.h"
#include "results.h"

template <class K>
class Driver {
 public:
  Driver(const Plan& plan, const Product& product, uint8_t* scratch)
      : p(plan), product(product), results(plan, product), scratch(scratch) {}

  void Run(Parallel& parallel) {
    image_chunk =
        p.is_lhs_channels ? 4 * kPixelChunk : Max(kPixelChunk, kChunkBytes / Max(1, p.source_channels));
    image_tasks = p.is_lhs_direct ? 0 : Images() * p.lhs_limbs.count * CeilDiv(p.points, image_chunk);
    const auto prepare = [](void* self, int64_t task, int worker) { Self(self)->Prepare(task, worker); };
    const auto multiply = [](void* self, int64_t task, int worker) { Self(self)->Multiply(task, worker); };
    parallel.Run({image_tasks + RhsTasks(), prepare}, {static_cast<int64_t>(p.tasks.size()), multiply}, this);
  }

 private:
  using Lhs = typename K::Lhs;
  using Rhs = typename K::Rhs;
  using Sums = typename Results<K>::Sums;
  using Corrections = typename Results<K>::Corrections;
  static constexpr bool kIsBytes = Results<K>::kIsBytes;
  static constexpr int64_t kTile = Results<K>::kTile;
  static constexpr int64_t kChunkBytes = 32768;
  static constexpr int64_t kPanelsBytes = 256 * 1024;  // of rhs that stay in L2 beside a block of lhs

  const Plan& p;
  const Product& product;
  const Results<K> results;
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
    if (p.is_rhs_own) return 0;
    if (p.is_rhs_pixels) return p.phases[0].blocks * p.rhs_parts;
    return Groups() * static_cast<int64_t>(p.phases.size()) * CeilDiv(p.panels, p.panels_at_once);
  }

  void Prepare(int64_t task, int worker) {
    if (task < image_tasks) return FillImage(task, worker);
    task -= image_tasks;
    if (p.is_rhs_pixels) return PackPixels(task, worker);
    const int64_t phases = static_cast<int64_t>(p.phases.size()), sets = CeilDiv(p.panels, p.panels_at_once);
    const int64_t group = task / sets / phases, first = task % sets * p.panels_at_once;
    const Phase& phase = p.phases[task / sets % phases];
    PackPanels(group, phase, first, Min(p.panels_at_once, p.panels - first), Panel(group, phase, first),
               worker);
  }

  void FillImage(int64_t task, int worker) {
    const int64_t chunks = CeilDiv(p.points, image_chunk), first = task % chunks * image_chunk;
    const int limb = static_cast<int>(task / chunks % p.lhs_limbs.count);
    const int64_t index = task / chunks / p.lhs_limbs.count, count = Min(image_chunk, p.points - first);
    const Image image{product.lhs,      p.grid, p.source, p.step, &p.image_shift[index * kSpace],
                      p.source_channels};
    const Limb which = p.lhs_limbs.limb[limb];
    if (!p.is_lhs_channels) {
      Lhs* points = LhsImage(limb) + (index * p.points + first) * p.lhs_stride;
      image.Fill(which, first, count, points);
      return TakeOffset(points, count * p.source_channels);
    }
    if (K::kIsNonnegative && first + count == p.points) ClearBehind(limb, index);
    auto* pixels = reinterpret_cast<Lhs*>(Worker(worker));
    for (int64_t i = 0; i < count; i += kPixelChunk) {
      const int64_t some = Min(kPixelChunk, count - i);
      image.Fill(which, first + i, some, pixels);
      TakeOffset(pixels, some * p.source_channels);
      Transpose(pixels, some, p.source_channels,
                LhsImage(limb) + index * p.source_channels * p.lhs_stride + first + i, p.lhs_stride);
    }
  }

  // A tap reads past the last pixel, where the low limbs of rhs have digits: no byte may be negative there.
  void ClearBehind(int limb, int64_t index) {
    for (int64_t c = 0; c < p.source_channels; ++c)
      __builtin_memset(LhsImage(limb) + (index * p.source_channels + c) * p.lhs_stride + p.points, 0,
                       (p.lhs_stride - p.points) * sizeof(Lhs));
  }

  static void TakeOffset(Lhs* bytes, int64_t count) {
    if constexpr (K::kIsNonnegative)
      for (int64_t i = 0; i < count; ++i) bytes[i] ^= 0x80;
  }

  // A block of pixels of dy for some of the panels, of every group.
  void PackPixels(int64_t task, int worker) {
    const Phase& phase = p.phases[0];
    const int64_t part = task % p.rhs_parts, panel = p.panels * part / p.rhs_parts,
                  end = p.panels * (part + 1) / p.rhs_parts;
    const auto block = static_cast<int>(task / p.rhs_parts);
    const Block& b = p.blocks[phase.first_block + block];
    const int64_t depth = b.segments == 0 ? 0 : p.segments[b.first_segment].depth;
    for (int64_t k = 0; k < depth; k += kPixelChunk) {
      const int64_t pixels = Min(kPixelChunk, depth - k), padded = Min(kPixelChunk, b.depth - k);
      const Pixels codes = CodesOf(p.segments[b.first_segment].lhs + k, pixels, panel, end, worker);
      for (int limb = 0; limb < p.rhs_limbs.count; ++limb) {
        const PixelRows rows = ReadPixels(codes, p.rhs_limbs.limb[limb], worker);
        for (int64_t group = 0; group < Groups(); ++group)
          for (int64_t i = panel; i < end; i += kPanelsAtOnce) {
            const Lhs* first = rows.first + group * p.rhs_group_step + (i - panel) * K::kNr;
            int64_t at = -rows.step;
            PackAcross<Lhs>([&] { return first + (at += rows.step); }, rows.step, pixels, padded,
                            {phase, limb, i, Min(kPanelsAtOnce, end - i), Panel(group, phase, i)},
                            b.rhs + k * K::kNr);
          }
      }
    }
    for (int64_t group = 0; group < Groups(); ++group)
      for (int64_t i = panel; i < end; ++i) Finish(phase, block, Panel(group, phase, i));
  }

  struct Pixels {  // of a matrix some columns, `step` elements from pixel to pixel; of an image all
    Operand codes;
    int64_t first, count, start, step, width;
  };

  struct PixelRows {
    const Lhs* first;
    int64_t step;
  };

  // Those of a matrix that comes as floats are quantized here.
  Pixels CodesOf(int64_t first, int64_t count, int64_t panel, int64_t end, int worker) const {
    const int64_t channels = product.geometry.out_channels, low = panel * K::kNr;
    const int64_t width = Groups() > 1 ? channels : Min(end * K::kNr, p.columns) - low;
    Pixels pixels{product.rhs, first, count, first * channels + low, channels, width};
    if (product.rhs.floats == nullptr) return pixels;
    const Floats& floats = *product.rhs.floats;
    uint8_t* planes = Worker(worker) + p.planes_offset;
    const int64_t runs = width == channels ? 1 : count, size = count * width / runs;
    int64_t bad = 0;
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t at = pixels.start + i * channels;
      const int bits = product.rhs.bits, exponent = product.rhs.exponent;
      uint8_t* out = planes + i * width;
      bad += floats.is_random ? QuantizeAtRandom(floats.values + at, size, floats.first + at, floats.draw,
                                                 bits, exponent, out, count * width)
                              : Quantize(floats.values + at, size, bits, exponent, out, count * width);
    }
    if (bad != 0) __atomic_fetch_add(floats.nonfinite, bad, __ATOMIC_RELAXED);
    for (int limb = 0; limb < LimbCount(product.rhs.bits); ++limb)
      pixels.codes.plane[limb] = planes + limb * count * width;
    pixels.start = 0, pixels.step = width;
    return pixels;
  }

  PixelRows ReadPixels(const Pixels& from, Limb limb, int worker) const {
    auto* pixels = reinterpret_cast<Lhs*>(Worker(worker));
    if (!p.is_rhs_matrix) {
      constexpr int64_t kOne[kSpace] = {1, 1, 1}, kNone[kSpace] = {};
      Image{product.rhs, p.grid, p.result, kOne, kNone, product.geometry.out_channels}.Fill(
          limb, from.first, from.count, pixels);
      return {pixels, product.geometry.out_channels};
    }
    if constexpr (kIsBytes) return {from.codes.plane[limb.shift / 8] + from.start, from.step};
    for (int64_t i = 0; i < from.count; ++i)
      ReadLimb(from.codes, limb, from.start + i * from.step, from.width, pixels + i * from.width);
    return {pixels, from.width};
  }

  int64_t Width(int64_t panel) const { return Min(K::kNr, p.columns - panel * K::kNr); }

  // Neighbouring panels, each `panel_bytes` behind the other from `packed` on.
  void PackPanels(int64_t group, const Phase& phase, int64_t first, int64_t panels, uint8_t* packed,
                  int worker) {
    const int64_t start = group * p.rhs_group_step + first * K::kNr * p.rhs_lane_step;
    for (int limb = 0; limb < p.rhs_limbs.count; ++limb)
      for (int b = 0; b < phase.blocks; ++b) {
        const Block& block = p.blocks[phase.first_block + b];
        int64_t done = block.rhs;
        for (int s = 0; s < block.segments; ++s) {
          const Segment& segment = p.segments[block.first_segment + s];
          const int64_t padded = RoundUp(segment.depth, p.shape.depth_unit);
          const Limb which = p.rhs_limbs.limb[limb];
          if (!p.is_rhs_along) {
            RowStarts starts = StartsOf(segment, start);
            const Target to{phase, limb, first, panels, packed};
            const uint8_t* plane = product.rhs.plane[which.shift / 8];
            if (kIsBytes || LimbCount(product.rhs.bits) == 1) {  // which may become 16-bit elements
              PackAcross<uint8_t>([&] { return plane + starts.Next(); }, p.rhs_depth_step, segment.depth,
                                  padded, to, done);
            } else {
              PackLimbsAcross(starts, which, segment.depth, padded, to, done);
            }
          }
          for (int64_t i = 0; p.is_rhs_along && i < panels; ++i)
            PackAlong(which, segment, start + i * K::kNr * p.rhs_lane_step, padded, Width(first + i),
                      Words(packed + i * phase.panel_bytes, phase, limb) + done,
                      reinterpret_cast<Lhs*>(Worker(worker)));
          done += padded * K::kNr;
        }
      }
    for (int64_t i = 0; i < panels; ++i)
      for (int b = 0; b < phase.blocks; ++b) Finish(phase, b, packed + i * phase.panel_bytes);
  }

  RowStarts StartsOf(const Segment& segment, int64_t start) const {
    return RowStarts(&p.pieces[segment.first_piece], segment.depth / segment.pieces, start, p.rhs_depth_step);
  }

  struct Target {  // neighbouring panels, each `panel_bytes` behind the other from `packed` on
    const Phase& phase;
    int limb;
    int64_t first, panels;
    uint8_t* packed;
  };

  // Columns are neighbours in memory: each group of rows is read along all panels, as it lies in memory.
  // `next()` is the row of the next depth, `step` elements behind the last.
  template <class Element, class Next>
  void PackAcross(Next next, int64_t step, int64_t depth, int64_t padded, const Target& to,
                  int64_t done) const {
    constexpr int64_t kAhead = 16;  // rows: on another page, which the processor does not expect
    const int64_t columns = (to.panels - 1) * K::kNr + Width(to.first + to.panels - 1);
    Element zeros[kPanelsAtOnce * K::kNr];
    for (Element& zero : zeros) zero = ZeroDigit(Element{});
    for (int64_t k = 0; k < padded; k += K::kGroup) {
      const Element* group[K::kGroup];
      for (int64_t j = 0; j < K::kGroup; ++j) {
        group[j] = k + j < depth ? next() : zeros;
        for (int64_t c = 0; c < columns && group[j] != zeros; c += 64 / int64_t{sizeof(Element)})
          __builtin_prefetch(group[j] + c + kAhead * step);
      }
      PackGroup(group, to, done + k * K::kNr);
    }
  }

  // The same of 16-bit limbs, which are made from several planes.
  void PackLimbsAcross(RowStarts starts, Limb limb, int64_t depth, int64_t padded, const Target& to,
                       int64_t done) const {
    const int64_t columns = (to.panels - 1) * K::kNr + Width(to.first + to.panels - 1);
    Lhs rows[K::kGroup][kPanelsAtOnce * K::kNr] = {};
    for (int64_t k = 0; k < padded; k += K::kGroup) {
      const Lhs* group[K::kGroup];
      for (int64_t j = 0; j < K::kGroup; ++j) {
        group[j] = rows[j];
        if (k + j < depth) {
          ReadLimb(product.rhs, limb, starts.Next(), columns, rows[j]);
        } else {
          Zeros(product.rhs, limb, columns, rows[j]);
        }
      }
      PackGroup(group, to, done + k * K::kNr);
    }
  }

  template <class Element>
  void PackGroup(const Element* const* group, const Target& to, int64_t done) const {
    for (int64_t i = 0; i < to.panels; ++i) {
      const Element* row[K::kGroup];
      for (int64_t j = 0; j < K::kGroup; ++j) row[j] = group[j] + i * K::kNr;
      auto* words = Words(to.packed + i * to.phase.panel_bytes, to.phase, to.limb) + done;
      InterleavePadded<K>(row, Width(to.first + i), reinterpret_cast<uint32_t*>(words));
    }
  }

  // The depth is contiguous in memory: `columns` takes kWordColumns of them, which become rows of words.
  void PackAlong(Limb limb, const Segment& segment, int64_t start, int64_t padded, int64_t width, Rhs* words,
                 Lhs* columns) const {
    const int64_t tap = segment.depth / segment.pieces;
    for (int64_t c = 0; c < K::kNr; c += kWordColumns) {
      for (int64_t i = 0; i < kWordColumns; ++i) {
        Lhs* column = columns + i * padded;
        const int64_t filled = c + i < width ? segment.depth : 0;
        for (int64_t k = filled; k < padded; ++k) column[k] = ZeroDigit(Lhs{});
        for (int j = 0; filled != 0 && j < segment.pieces; ++j)
          ReadLimb(product.rhs, limb,
                   start + (c + i) * p.rhs_lane_step + p.pieces[segment.first_piece + j].rhs, tap,
                   column + j * tap);
      }
      InterleaveColumns(columns, padded, padded / K::kGroup, reinterpret_cast<uint32_t*>(words) + c, K::kNr);
    }
  }

  void Finish(const Phase& phase, int block, uint8_t* panel) const {
    SumDigits(phase, block, panel);
    if constexpr (K::kSaturates) ListLargePairs(phase, block, panel);
  }

  LargePairs& LargePairsOf(const Phase& phase, int block, uint8_t* panel) const {
    return reinterpret_cast<LargePairs*>(DigitSums(panel, phase) + phase.blocks * K::kNr)[block];
  }

  void ListLargePairs(const Phase& phase, int block, uint8_t* panel) const {
    constexpr int64_t kSeldom = 32;  // one in 8 * kSeldom
    const Block& b = p.blocks[phase.first_block + block];
    const Rhs* words = Words(panel, phase, 0) + b.rhs;
    LargePairs& large = LargePairsOf(phase, block, panel);
    const int64_t most = Min(LargePairs::kMost, b.depth / kSeldom);
    int64_t row = 0, count = 0;
    for (int s = 0; s < b.segments; ++s) {
      const Segment& segment = p.segments[b.first_segment + s];
      for (int64_t k = 0; k < segment.depth; k += K::kGroup, row += K::kGroup * K::kNr) {
        if (!K::HasLargePair(words + row)) continue;
        for (int64_t i = row; i < row + K::kGroup * K::kNr; i += 2) {
          if (words[i] + words[i + 1] <= 128 && words[i] + words[i + 1] >= -128) continue;
          if (count < most) large.pair[count] = {segment.lhs + k + i % K::kGroup, i};
          if (++count > most) return void(large.count = LargePairs::kMost + 1);
        }
      }
    }
    large.count = count;
  }

  // A block's sums where two products may saturate: what they lack is added, or they are kept apart.
  void RunSaturating(const Lhs* lhs, const Segment* segments, int count, const Rhs* words,
                     const LargePairs& large, int rows, bool is_first, int32_t* tile) const {
    if (large.count > LargePairs::kMost)
      return K::Apart::Run(lhs, p.lhs_stride, segments, count, words, rows, is_first, tile);
    K::Run(lhs, p.lhs_stride, segments, count, words, rows, is_first, tile);
    for (int64_t i = 0; i < large.count; ++i) {
      const Rhs* b = words + large.pair[i].rhs;
      const Lhs* a = lhs + large.pair[i].lhs;
      const int64_t column = large.pair[i].rhs / K::kGroup % K::kNr;
      for (int r = 0; r < rows; ++r, a += p.lhs_stride) {
        const int32_t sum = a[0] * b[0] + a[1] * b[1];
        const int32_t lacking = sum > 32767 ? sum - 32767 : sum < -32768 ? sum + 32768 : 0;
        uint32_t whole = static_cast<uint32_t>(tile[r * K::kNr + column]);
        whole += static_cast<uint32_t>(lacking);  // modulo 2^32
        tile[r * K::kNr + column] = static_cast<int32_t>(whole);
      }
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

  Sums SumsAt(int worker, int64_t slot) const {
    const int64_t pairs = p.lhs_limbs.count * p.rhs_limbs.count;
    const int64_t bytes = kTile * (4 * pairs + (p.is_wide ? 8 : 0));
    uint8_t* at = Worker(worker) + p.temporary_bytes + slot * bytes;
    return {reinterpret_cast<int32_t*>(at), reinterpret_cast<int64_t*>(at + 4 * pairs * kTile)};
  }

  void Multiply(int64_t index, int worker) {
    const Task& task = p.tasks[index];
    const Phase& phase = p.phases[task.phase];
    Place at{task, phase, worker, Panel(task.group, phase, task.first_panel)};
    if (p.is_rhs_own) {
      at.packed = Worker(worker) + p.own_panels_offset;
      PackPanels(task.group, phase, task.first_panel, task.panels, at.packed, worker);
    }
    const bool is_along = task.panels * phase.panel_bytes <= kPanelsBytes;
    K::Setup();
    for (int b = 0; b < phase.blocks; ++b) {
      // Panels that stay in the cache together meet a block of rows one after the other; else one panel meets
      // all blocks of rows.
      const int64_t together = is_along ? task.panels : 1;
      for (int64_t panel = 0; panel < task.panels; panel += together) MultiplyRows(at, b, panel, together);
    }
    K::Leave();
    FinishStreams();
  }

  struct Place {  // where a task is at work
    const Task& task;
    const Phase& phase;
    int worker;
    uint8_t* packed;  // its first panel
  };

  void MultiplyRows(const Place& at, int b, int64_t first, int64_t panels) const {
    const Task& task = at.task;
    const Phase& phase = at.phase;
    Corrections corrections[kPanelsAtOnce];
    for (int64_t set = first; set < first + panels; set += kPanelsAtOnce) {
      const int64_t end = Min(first + panels, set + kPanelsAtOnce);
      if (b + 1 == phase.blocks)
        for (int64_t panel = set; panel < end; ++panel)
          corrections[panel - set].Set(p, phase, DigitSums(at.packed + panel * phase.panel_bytes, phase));
      int run = FindRun(phase, task.first_tile);
      for (int64_t tile = 0; tile < task.tiles; ++tile) {  // register blocks of rows
        while (run + 1 < phase.first_run + phase.runs && p.runs[run + 1].tile <= task.first_tile + tile)
          ++run;
        const int64_t row = (task.first_tile + tile - p.runs[run].tile) * K::kMr;
        int64_t row_sums[K::kMr] = {};
        if (kIsBytes && p.rhs_limbs.count > 1 && b + 1 == phase.blocks)
          SumRows(phase, FirstOf(task, p.runs[run], row), Rows(p.runs[run], row), row_sums);
        float* out[K::kMr];
        if (b + 1 == phase.blocks) results.FindRows(phase, p.runs[run], row, Rows(p.runs[run], row), out);
        for (int64_t panel = set; panel < end; ++panel) {
          const int64_t slot = p.is_single_block ? 0 : tile * task.panels + panel;
          MultiplyTile(at, b, panel, p.runs[run], row, SumsAt(at.worker, slot), corrections[panel - set],
                       row_sums, out);
        }
      }
    }
  }

  int FindRun(const Phase& phase, int64_t tile) const {
    int low = phase.first_run, high = phase.first_run + phase.runs;  // low's first tile is not beyond
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (p.runs[middle].tile <= tile ? low : high) = middle;
    }
    return low;
  }

  void MultiplyTile(const Place& at, int b, int64_t panel, const RowRun& run, int64_t row, Sums sums,
                    const Corrections& corrections, const int64_t* row_sums, float* const* out) const {
    const Task& task = at.task;
    const Phase& phase = at.phase;
    const Block& block = p.blocks[phase.first_block + b];
    const bool is_first = b == 0 || p.blocks[phase.first_block + b - 1].is_last;
    const int64_t start = FirstOf(task, run, row);
    const int rows = Rows(run, row);
    uint8_t* packed = at.packed + panel * phase.panel_bytes;
    const Segment* segments = p.segments.data() + block.first_segment;
    int32_t* tile = sums.narrow;
    for (int i = 0; i < p.lhs_limbs.count; ++i)  // pairs of limbs
      for (int j = 0; j < p.rhs_limbs.count; ++j, tile += kTile) {
        const Lhs* lhs = LhsRows(i) + start;
        const Rhs* words = Words(packed, phase, j) + block.rhs;
        if constexpr (K::kSaturates) {
          RunSaturating(lhs, segments, block.segments, words, LargePairsOf(phase, b, packed), rows, is_first,
                        tile);
        } else {
          K::Run(lhs, p.lhs_stride, segments, block.segments, words, rows, is_first, tile);
        }
      }
    if (!block.is_last) return;
    const bool is_done = b + 1 == phase.blocks;
    if (p.is_wide && phase.blocks > 1) results.Widen(sums, rows, b == FirstLast(phase));
    if (!is_done) return;
    const int64_t number = task.first_panel + panel;
    const int64_t column = task.group * p.out_group_step + number * K::kNr;
    if (p.is_wide) {
      results.StoreWide(sums, phase.blocks > 1, rows, Width(number), column, corrections, row_sums, out);
    } else {
      results.StoreNarrow(sums.narrow, rows, Width(number), column, corrections, out);
    }
  }

  int64_t FirstOf(const Task& task, const RowRun& run, int64_t row) const {  // element of lhs
    return task.group * p.lhs_group_step + run.lhs + row * p.lhs_stride;
  }

  static int Rows(const RowRun& run, int64_t row) { return static_cast<int>(Min(K::kMr, run.rows - row)); }

  int FirstLast(const Phase& phase) const {  // the first block whose sums leave int32
    int b = 0;
    while (!p.blocks[phase.first_block + b].is_last) ++b;
    return b;
  }

  // Sums of the codes of lhs, where they are bytes.
  void SumRows(const Phase& phase, int64_t start, int rows, int64_t* sums) const {
    if constexpr (kIsBytes) {
      const int64_t offset = Results<K>::kLhsOffset << (8 * (p.lhs_limbs.count - 1));
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
};
