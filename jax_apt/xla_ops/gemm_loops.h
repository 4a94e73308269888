// The GEMM algorithm around a micro-kernel: widths, blocking, the five loops, and storing.
//
// Included by each ISA unit inside its own anonymous namespace (hence no include guard, no system headers
// and no std:: templates), so that every unit compiles it with its own instructions.
//
// A micro-kernel type describes itself:
//   Lhs, Rhs     packed element types
//   kGroup       depth elements that one instruction multiplies and adds: 32 bits of Lhs or Rhs
//   kMr, kNr     rows and columns of its register block
//   kKc          most depth elements between two stores of a tile
//   kLhsOffset   what packing adds to a code of lhs (128 makes signed codes unsigned)
//   Run(lhs, rhs, start, groups, tile): tile[r * kNr + c] = start[c] + sum over the depth

#include "gemm_packing.h"

constexpr int64_t kMc = kMaxLanes;      // rows of a packed block of lhs: it stays in L2
constexpr int64_t kNc = 512;            // columns of a block of 64-bit sums
constexpr int64_t kMinColumns = 128;    // of a task, if the rows stay whole
constexpr int64_t kTasksPerWorker = 2;  // so that none waits long for the last
constexpr int64_t kMinKc = 256;  // a limb product that must be stored more often is not worth its while

// How two widths are multiplied. A block of depth kc never overflows an int32 sum:
//   kc * (largest lhs limb) * (largest rhs limb) < 2^31.
// Two 16-bit limbs would leave room for one product, so a 16-bit limb meets bytes:
//   8 x 8, 16 x 8: one product; 16 x 16, 24 x 8: two; 24 x 16: three; 24 x 24: six.
struct Plan {
  Limbs lhs, rhs;
  int64_t kc;          // depth of a block
  bool fits_in_int32;  // one limb each, and the whole sum fits
};

template <class K>
Plan MakePlan(const Gemm& g) {
  constexpr int kTopBits[3][2] = {{16, 16}, {16, 8}, {8, 16}};
  Plan best{};
  for (const auto& top_bits : kTopBits) {
    const Limbs lhs = SplitBits(g.lhs.bits, top_bits[0]), rhs = SplitBits(g.rhs.bits, top_bits[1]);
    const int64_t largest = lhs.largest * rhs.largest, safe = kInt32Max / largest;
    const bool is_better = best.kc == 0 || lhs.count * rhs.count < best.lhs.count * best.rhs.count;
    if (safe < kMinKc || !is_better) continue;
    const bool is_single = lhs.count == 1 && rhs.count == 1;
    best = {lhs, rhs, Min(K::kKc, safe / K::kGroup * K::kGroup), is_single && g.k <= safe};
  }
  return best;
}

template <class K>
class Driver {
 public:
  Driver(const Gemm& gemm, int workers) : g(gemm), plan(MakePlan<K>(gemm)), workers(workers) {}

  size_t ScratchBytes() const { return RhsBytes() + RoundUp(g.n, 64) + workers * WorkerBytes(); }

  // Packs all of rhs, then multiplies; both are shared out among the workers.
  void Run(void* scratch, Parallel& parallel) {
    rhs = static_cast<uint8_t*>(scratch);
    is_bad_column = rhs + RhsBytes();
    per_worker = is_bad_column + RoundUp(g.n, 64);
    for (int64_t c = 0; c < g.n; ++c) is_bad_column[c] = 0;
    parallel.Run(
        panels, [](void* self, int64_t panel, int) { Self(self)->PackPanel(panel); }, this);
    parallel.Run(
        row_tasks * column_tasks,
        [](void* self, int64_t task, int worker) { Self(self)->RunTask(task, worker); }, this);
  }

 private:
  using Lhs = typename K::Lhs;
  using Rhs = typename K::Rhs;

  // A block of rows times some panels of columns.
  struct Tile {
    int64_t m0, rows;  // first row, number of rows
    int64_t p0, p1;    // panels
    int64_t n0, n1;    // columns
    Lhs* lhs;          // packed block of rows
    int64_t* sums;     // (kMc, kNc), unless the sums fit in int32
    uint8_t* is_bad_row;
  };

  const Gemm& g;
  const Plan plan;
  const int workers;
  const int64_t blocks = CeilDiv(Max(g.k, 1), plan.kc);  // of the depth
  const int64_t panels = CeilDiv(g.n, K::kNr);
  const int64_t panel_bytes =
      RoundUp((RoundUp(Min(g.k, plan.kc), K::kGroup) / K::kGroup + 1) * K::kNr * 4, 64);
  const int64_t lhs_bytes = RoundUp(RoundUp(kMc, K::kMr) * LhsLayout<K>::kStride * int64_t{sizeof(Lhs)}, 64);
  const int64_t sums_bytes = plan.fits_in_int32 ? 0 : kMc * kNc * int64_t{sizeof(int64_t)};
  const int64_t rows_per_task = RowsPerTask();
  const int64_t row_tasks = CeilDiv(g.m, rows_per_task);
  const int64_t panels_per_task = CeilDiv(panels, ColumnTasks());
  const int64_t column_tasks = CeilDiv(panels, panels_per_task);

  uint8_t* rhs = nullptr;            // packed panels, [block][rhs limb][panel]
  uint8_t* is_bad_column = nullptr;  // (N), 1 where rhs has a non-finite value
  uint8_t* per_worker = nullptr;     // packed lhs, then 64-bit sums

  static Driver* Self(void* self) { return static_cast<Driver*>(self); }

  // Rows are shared out in at least half blocks. Fewer rows than that stay whole if there are columns to
  // split instead, though each block of columns packs its rows again.
  bool AreRowsWhole() const {
    return g.m < kTasksPerWorker * workers * kMc / 2 && g.n >= workers * kMinColumns;
  }

  int64_t RowsPerTask() const {
    const int64_t tasks = AreRowsWhole() ? 1 : kTasksPerWorker * workers;
    return RoundUp(Min(kMc, CeilDiv(g.m, tasks)), K::kMr);
  }

  int64_t ColumnTasks() const {
    const int64_t wanted = row_tasks >= workers ? 1 : CeilDiv(kTasksPerWorker * workers, row_tasks);
    const int64_t most = AreRowsWhole() ? g.n / kMinColumns : panels;
    const int64_t widest = plan.fits_in_int32 ? panels : kNc / K::kNr;  // where the 64-bit sums end
    return Max(CeilDiv(panels, widest), Min(wanted, most));
  }

  int64_t RhsBytes() const { return blocks * plan.rhs.count * panels * panel_bytes; }
  int64_t WorkerBytes() const { return lhs_bytes + sums_bytes; }
  int64_t Depth(int64_t block) const { return Min(plan.kc, g.k - block * plan.kc); }

  int32_t* Panel(int64_t block, int limb, int64_t panel) const {
    return reinterpret_cast<int32_t*>(rhs + ((block * plan.rhs.count + limb) * panels + panel) * panel_bytes);
  }

  void PackPanel(int64_t panel) {
    const int64_t n0 = panel * K::kNr, columns = Min(K::kNr, g.n - n0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int limb = 0; limb < plan.rhs.count; ++limb)
        PackRhs<K>(g, plan.rhs.limb[limb], n0, columns, block * plan.kc, Depth(block),
                   Panel(block, limb, panel), is_bad_column + n0);
  }

  // Loops 5 and 3, over blocks of columns and of rows, are the tasks.
  void RunTask(int64_t task, int worker) {
    const int64_t m0 = task % row_tasks * rows_per_task, p0 = task / row_tasks * panels_per_task;
    const int64_t p1 = Min(panels, p0 + panels_per_task);
    uint8_t* memory = per_worker + worker * WorkerBytes();
    uint8_t is_bad_row[kMc] = {};
    const Tile tile{m0,
                    Min(rows_per_task, g.m - m0),
                    p0,
                    p1,
                    p0 * K::kNr,
                    Min(g.n, p1 * K::kNr),
                    reinterpret_cast<Lhs*>(memory),
                    reinterpret_cast<int64_t*>(memory + lhs_bytes),
                    is_bad_row};
    for (int64_t block = 0; block < blocks; ++block)     // loop 4: depth
      for (int limb = 0; limb < plan.lhs.count; ++limb)  // and, for wide codes, limbs
        MultiplyBlock(tile, block, limb);
    if (!plan.fits_in_int32) ConvertSums(tile);
    SpoilNonFinite(tile);
  }

  void MultiplyBlock(const Tile& tile, int64_t block, int lhs_limb) {
    PackLhs<K>(g, plan.lhs.limb[lhs_limb], tile.m0, tile.rows, block * plan.kc, Depth(block), tile.lhs,
               tile.is_bad_row);
    for (int rhs_limb = 0; rhs_limb < plan.rhs.count; ++rhs_limb)
      MacroKernel(tile, block, lhs_limb, rhs_limb);
  }

  void MacroKernel(const Tile& tile, int64_t block, int lhs_limb, int rhs_limb) {
    const int64_t groups = CeilDiv(Depth(block), K::kGroup);
    const int shift = plan.lhs.limb[lhs_limb].shift + plan.rhs.limb[rhs_limb].shift;
    const bool is_first = block == 0 && lhs_limb == 0 && rhs_limb == 0;
    for (int64_t p = tile.p0; p < tile.p1; ++p) {  // loop 2: panels of columns
      const int32_t* start = Panel(block, rhs_limb, p);
      const int64_t n0 = p * K::kNr, width = Min(K::kNr, g.n - n0);
      for (int64_t m = 0; m < tile.rows; m += K::kMr) {  // loop 1: register blocks of rows
        alignas(64) int32_t sums[K::kMr * K::kNr];
        K::Run(tile.lhs + m * LhsLayout<K>::kStride, reinterpret_cast<const Rhs*>(start + K::kNr), start,
               groups, sums);
        const int64_t height = Min(K::kMr, tile.rows - m);
        if (plan.fits_in_int32) {
          StoreSums(sums, g.out + (tile.m0 + m) * g.n + n0, height, width, is_first, block == blocks - 1);
        } else {
          AddSums(sums, tile.sums + m * kNc + n0 - tile.n0, height, width, shift, is_first);
        }
      }
    }
  }

  // Powers of two multiply exactly; the smaller first keeps both steps within float32's range.
  float LowScale() const { return PowerOfTwo(Min(g.lhs.exponent, g.rhs.exponent)); }
  float HighScale() const { return PowerOfTwo(Max(g.lhs.exponent, g.rhs.exponent)); }

  // Partial sums stay in the output as int32 between depth blocks; the last block converts them.
  void StoreSums(int32_t* sums, float* out, int64_t height, int64_t width, bool is_first,
                 bool is_last) const {
    const float low = LowScale(), high = HighScale();
    for (int64_t r = 0; r < height; ++r, sums += K::kNr, out += g.n) {
      if (!is_first) AddBits(out, width, sums);
      if (is_last) {
        for (int64_t c = 0; c < width; ++c) out[c] = static_cast<float>(sums[c]) * low * high;
      } else {
        __builtin_memcpy(out, sums, width * sizeof(float));
      }
    }
  }

  static void AddBits(const float* bits, int64_t width, int32_t* sums) {
    int32_t earlier[K::kNr];
    __builtin_memcpy(earlier, bits, width * sizeof(float));
    for (int64_t c = 0; c < width; ++c) sums[c] += earlier[c];
  }

  void AddSums(const int32_t* sums, int64_t* out, int64_t height, int64_t width, int shift,
               bool is_first) const {
    for (int64_t r = 0; r < height; ++r, sums += K::kNr, out += kNc) {
      if (is_first)
        for (int64_t c = 0; c < width; ++c) out[c] = 0;
      for (int64_t c = 0; c < width; ++c)  // an unsigned shift, since a negative one is undefined
        out[c] += static_cast<int64_t>(static_cast<uint64_t>(int64_t{sums[c]}) << shift);
    }
  }

  void ConvertSums(const Tile& tile) const {
    const float low = LowScale(), high = HighScale();
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* out = g.out + (tile.m0 + r) * g.n + tile.n0;
      const int64_t* sums = tile.sums + r * kNc;
      for (int64_t c = 0; c < tile.n1 - tile.n0; ++c) out[c] = static_cast<float>(sums[c]) * low * high;
    }
  }

  void SpoilNonFinite(const Tile& tile) const {
    uint8_t is_any = 0;
    for (int64_t c = tile.n0; c < tile.n1; ++c) is_any |= is_bad_column[c];
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (!tile.is_bad_row[r] && !is_any) continue;
      for (int64_t c = tile.n0; c < tile.n1; ++c)
        if (tile.is_bad_row[r] || is_bad_column[c]) g.out[(tile.m0 + r) * g.n + c] = __builtin_nanf("");
    }
  }
};

// `Narrow` multiplies codes of at most 8 bits, `Wide` all others.
template <class Narrow, class Wide, class F>
auto WithDriver(const Gemm& g, int workers, F f) {
  if (g.lhs.bits <= 8 && g.rhs.bits <= 8) {
    Driver<Narrow> driver(g, workers);
    return f(driver);
  }
  Driver<Wide> driver(g, workers);
  return f(driver);
}

template <class Narrow, class Wide>
size_t ScratchBytes(const Gemm& g, int workers) {
  return WithDriver<Narrow, Wide>(g, workers, [](auto& driver) { return driver.ScratchBytes(); });
}

template <class Narrow, class Wide>
void RunGemm(const Gemm& g, void* scratch, Parallel& parallel) {
  WithDriver<Narrow, Wide>(g, parallel.workers(), [&](auto& driver) { driver.Run(scratch, parallel); });
}
