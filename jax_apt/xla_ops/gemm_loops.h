// The GEMM algorithm around a micro-kernel: widths, limbs, packing and the five loops.
//
// Included by each ISA unit inside its own anonymous namespace (hence no include guard, no includes and
// no std:: templates), so that every unit compiles it with its own instructions.
//
// A micro-kernel type describes itself:
//   Lhs, Rhs     packed element types
//   kGroup       depth elements that one instruction multiplies and adds
//   kMr, kNr     rows and columns of its register block
//   kKc          most depth elements between two stores of a tile
//   kLhsOffset   what packing adds to a code of lhs (128 makes signed codes unsigned)
//   Run(lhs, rhs, start, groups, tile): tile[r * kNr + c] = start[c] + sum over the depth

constexpr int64_t kMc = 96;   // rows of a packed block of lhs: it stays in L2
constexpr int64_t kNc = 512;  // columns of a block of 64-bit sums
constexpr int64_t kInt32Max = 2147483647;

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
int64_t MaxCode(int bits) { return (int64_t{1} << (bits - 1)) - 1; }

float PowerOfTwo(int exponent) {  // exact for -126..127
  const uint32_t pattern = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &pattern, 4);
  return value;
}

// ---- Limbs -----------------------------------------------------------------------------------------
//
// A wide code is a sum of limbs: code = sum of limb_i * 2^shift_i, where the top limb keeps the sign and
// the others are unsigned. A product of two codes is the sum of the products of their limbs. 16-bit
// limbs of one operand meet limbs of at most 8 bits of the other:
//
//   |16-bit limb| <= 2^15, |8-bit limb| <= 255:  256 products stay below 2^15 * 255 * 256 < 2^31.

constexpr int64_t kWideKc = 256;  // depth that an int32 sum of 16-bit times 8-bit limbs always holds

struct Limb {
  int shift;
  int32_t mask;  // -1 for the top limb
};

struct Limbs {
  Limb limb[3];
  int count;
};

Limbs SplitBits(int bits, int limb_bits) {
  Limbs limbs{};
  for (int shift = 0; shift < bits; shift += limb_bits) {
    const bool is_top = shift + limb_bits >= bits;
    limbs.limb[limbs.count++] = {shift, is_top ? -1 : (1 << limb_bits) - 1};
    if (is_top) break;
  }
  return limbs;
}

// lhs keeps 16-bit limbs; so does rhs if lhs is narrow. 24 bits split 8 + 16 so that no low limb exceeds
// 255 where the other operand has 16 bits.
struct Plan {
  Limbs lhs, rhs;
  int64_t kc;          // depth of a block
  bool fits_in_int32;  // one limb each, and the whole sum fits
};

template <class K>
Plan MakePlan(const Gemm& g) {
  const bool is_narrow = g.lhs.bits <= 8 && g.rhs.bits <= 8;
  Plan plan;
  plan.lhs = g.lhs.bits > 16 ? Limbs{{{0, 255}, {8, -1}}, 2} : SplitBits(g.lhs.bits, 16);
  plan.rhs = g.lhs.bits > 8    ? SplitBits(g.rhs.bits, 8)
             : g.rhs.bits > 16 ? Limbs{{{0, 255}, {8, -1}}, 2}
                               : SplitBits(g.rhs.bits, 16);
  plan.kc = is_narrow ? int64_t{K::kKc} : Min(K::kKc, kWideKc);
  const int64_t largest = MaxCode(g.lhs.bits) * MaxCode(g.rhs.bits);
  plan.fits_in_int32 = plan.lhs.count == 1 && plan.rhs.count == 1 && g.k <= kInt32Max / Max(largest, 1);
  return plan;
}

// ---- Reading codes -----------------------------------------------------------------------------------

template <class T>
struct Reader {  // integer codes
  explicit Reader(const Operand& operand) : data(static_cast<const T*>(operand.data)) {}
  static constexpr int32_t kMarker = -(int32_t{1} << (8 * sizeof(T) - 2)) * 2;
  bool IsFinite(int64_t i) const { return data[i] != kMarker; }
  int32_t Code(int64_t i) const { return data[i] == kMarker ? 0 : data[i]; }
  const T* data;
};

template <>
struct Reader<float> {  // quantizes: clips in float, since conversion turns large values into INT_MIN
  explicit Reader(const Operand& operand)
      : data(static_cast<const float*>(operand.data)),
        inverse(PowerOfTwo(-operand.exponent)),
        limit(static_cast<float>(MaxCode(operand.bits))) {}
  bool IsFinite(int64_t i) const { return data[i] - data[i] == 0.0f; }
  int32_t Code(int64_t i) const {
    float x = data[i] * inverse;
    x = x < limit ? x : limit;  // a NaN becomes the limit; its row is overwritten by NaN
    x = x > -limit ? x : -limit;
    return static_cast<int32_t>(__builtin_rintf(x));
  }
  const float* data;
  float inverse, limit;
};

template <class F>
void WithReader(const Operand& operand, F f) {
  switch (operand.dtype) {
    case DType::kF32: return f(Reader<float>(operand));
    case DType::kS8: return f(Reader<int8_t>(operand));
    case DType::kS16: return f(Reader<int16_t>(operand));
    case DType::kS32: return f(Reader<int32_t>(operand));
  }
}

// ---- Packing -----------------------------------------------------------------------------------------

// Packed lhs: each row contiguous, rows kLhsStride apart, so that the micro-kernel's addresses are
// constants. The extra 64 bytes keep the rows of a tile out of one L1 set.
template <class K>
constexpr int64_t kLhsStride = K::kKc + 64 / sizeof(typename K::Lhs);

// Rows m0.. of limb `limb` at depth k0.., zero-filled to whole groups and whole register blocks.
template <class K, class R>
void PackLhs(const R& lhs, const Gemm& g, Limb limb, int64_t m0, int64_t rows, int64_t k0, int64_t depth,
             typename K::Lhs* packed, uint8_t* is_bad_row) {
  const int64_t row_step = g.lhs.is_transposed ? 1 : g.k, k_step = g.lhs.is_transposed ? g.m : 1;
  const int64_t padded = RoundUp(depth, K::kGroup);
  for (int64_t r = 0; r < RoundUp(rows, K::kMr); ++r) {
    typename K::Lhs* out = packed + r * kLhsStride<K>;
    int64_t k = 0;
    if (r < rows) {
      const int64_t start = (m0 + r) * row_step + k0 * k_step;
      bool is_bad = false;
      if (k_step == 1) {
        for (; k < depth; ++k) {
          out[k] = ((lhs.Code(start + k) >> limb.shift) & limb.mask) + K::kLhsOffset;
          is_bad |= !lhs.IsFinite(start + k);
        }
      } else {
        for (; k < depth; ++k) {
          out[k] = ((lhs.Code(start + k * k_step) >> limb.shift) & limb.mask) + K::kLhsOffset;
          is_bad |= !lhs.IsFinite(start + k * k_step);
        }
      }
      is_bad_row[r] |= is_bad;
    }
    for (; k < padded; ++k) out[k] = K::kLhsOffset;
  }
}

// A packed panel of rhs: kNr starting values, then [depth / kGroup][kNr][kGroup].
template <class K>
constexpr int64_t PanelBytes(int64_t depth) {
  return RoundUp(static_cast<int64_t>(sizeof(int32_t)) * K::kNr +
                     RoundUp(depth, K::kGroup) * K::kNr * static_cast<int64_t>(sizeof(typename K::Rhs)),
                 64);
}

// Columns n0.. of limb `limb` at depth k0..; the starting values undo lhs's offset:
//   sum (lhs + offset) * rhs - offset * sum rhs = sum lhs * rhs.
template <class K, class R>
void PackRhs(const R& rhs, const Gemm& g, Limb limb, int64_t n0, int64_t columns, int64_t k0, int64_t depth,
             uint8_t* panel, uint8_t* is_bad_column) {
  const int64_t n_step = g.rhs.is_transposed ? g.k : 1, k_step = g.rhs.is_transposed ? 1 : g.n;
  int32_t* start = reinterpret_cast<int32_t*>(panel);
  auto* out = reinterpret_cast<typename K::Rhs*>(start + K::kNr);
  int32_t sums[K::kNr] = {};
  uint8_t is_bad[K::kNr] = {};
  for (int64_t k = 0; k < RoundUp(depth, K::kGroup); ++k) {
    typename K::Rhs* group = out + k / K::kGroup * K::kGroup * K::kNr + k % K::kGroup;
    const int64_t at = n0 * n_step + (k0 + k) * k_step;
    const int64_t width = k < depth ? columns : 0;
    for (int64_t c = 0; c < width; ++c) {
      const int32_t code = (rhs.Code(at + c * n_step) >> limb.shift) & limb.mask;
      group[c * K::kGroup] = static_cast<typename K::Rhs>(code);
      sums[c] += code;
      is_bad[c] |= !rhs.IsFinite(at + c * n_step);
    }
    for (int64_t c = width; c < K::kNr; ++c) group[c * K::kGroup] = 0;
  }
  for (int c = 0; c < K::kNr; ++c) start[c] = -K::kLhsOffset * sums[c];
  for (int64_t c = 0; c < columns; ++c) is_bad_column[c] |= is_bad[c];
}

// ---- The driver --------------------------------------------------------------------------------------

template <class K>
struct Driver {
  const Gemm& g;
  const Plan plan;
  const int workers;
  const int64_t blocks = CeilDiv(Max(g.k, 1), plan.kc);  // of the depth
  const int64_t panels = CeilDiv(g.n, K::kNr);
  const int64_t panel_bytes = PanelBytes<K>(plan.kc);
  const int64_t lhs_bytes =
      RoundUp((kMc + K::kMr) * kLhsStride<K> * static_cast<int64_t>(sizeof(typename K::Lhs)), 64);
  const int64_t sums_bytes = plan.fits_in_int32 ? 0 : kMc * kNc * static_cast<int64_t>(sizeof(int64_t));
  const int64_t rows_per_task = Max(K::kMr, Min(kMc, RoundUp(CeilDiv(g.m, 2 * workers), K::kMr)));
  const int64_t row_tasks = CeilDiv(g.m, rows_per_task);
  const int64_t panels_per_task = PanelsPerTask();
  const int64_t column_tasks = CeilDiv(panels, panels_per_task);

  uint8_t* rhs = nullptr;          // packed panels, [block][rhs limb][panel]
  uint8_t* bad_columns = nullptr;  // (N), 1 where rhs has a non-finite value
  uint8_t* per_worker = nullptr;   // packed lhs, then 64-bit sums

  Driver(const Gemm& gemm, int workers) : g(gemm), plan(MakePlan<K>(gemm)), workers(workers) {}

  // Whole rows of panels if there are row blocks enough for every worker; 64-bit sums hold kNc columns.
  int64_t PanelsPerTask() const {
    const int64_t wanted = row_tasks >= workers ? 1 : CeilDiv(2 * workers, Max(row_tasks, 1));
    const int64_t most = plan.fits_in_int32 ? panels : Min(panels, kNc / K::kNr);
    return Max(1, Min(most, CeilDiv(panels, wanted)));
  }

  int64_t RhsBytes() const { return blocks * plan.rhs.count * panels * panel_bytes; }
  int64_t WorkerBytes() const { return lhs_bytes + sums_bytes; }
  size_t ScratchBytes() const { return RhsBytes() + RoundUp(g.n, 64) + workers * WorkerBytes(); }

  void Run(void* scratch, Parallel& parallel) {
    rhs = static_cast<uint8_t*>(scratch);
    bad_columns = rhs + RhsBytes();
    per_worker = bad_columns + RoundUp(g.n, 64);
    for (int64_t c = 0; c < g.n; ++c) bad_columns[c] = 0;
    parallel.Run(
        panels, [](void* self, int64_t panel, int) { static_cast<Driver*>(self)->PackPanel(panel); }, this);
    parallel.Run(
        row_tasks * column_tasks,
        [](void* self, int64_t task, int worker) {
          Driver* driver = static_cast<Driver*>(self);
          driver->MacroKernel(task % driver->row_tasks, task / driver->row_tasks, worker);
        },
        this);
  }

  uint8_t* Panel(int64_t block, int limb, int64_t panel) const {
    return rhs + ((block * plan.rhs.count + limb) * panels + panel) * panel_bytes;
  }

  int64_t Depth(int64_t block) const { return Min(plan.kc, g.k - block * plan.kc); }

  void PackPanel(int64_t panel) {
    const int64_t n0 = panel * K::kNr, columns = Min(K::kNr, g.n - n0);
    WithReader(g.rhs, [&](const auto& reader) {
      for (int64_t block = 0; block < blocks; ++block)
        for (int limb = 0; limb < plan.rhs.count; ++limb)
          PackRhs<K>(reader, g, plan.rhs.limb[limb], n0, columns, block * plan.kc, Depth(block),
                     Panel(block, limb, panel), bad_columns + n0);
    });
  }

  // One block of rows times some panels: the loops over depth, limbs, panels and register blocks.
  void MacroKernel(int64_t row_task, int64_t column_task, int worker) {
    const int64_t m0 = row_task * rows_per_task, rows = Min(rows_per_task, g.m - m0);
    const int64_t p0 = column_task * panels_per_task, p1 = Min(panels, p0 + panels_per_task);
    auto* lhs = reinterpret_cast<typename K::Lhs*>(per_worker + worker * WorkerBytes());
    auto* sums = reinterpret_cast<int64_t*>(per_worker + worker * WorkerBytes() + lhs_bytes);
    uint8_t bad_rows[kMc] = {};

    for (int64_t block = 0; block < blocks; ++block) {  // depth
      for (int i = 0; i < plan.lhs.count; ++i) {        // limbs of lhs
        WithReader(g.lhs, [&](const auto& reader) {
          PackLhs<K>(reader, g, plan.lhs.limb[i], m0, rows, block * plan.kc, Depth(block), lhs, bad_rows);
        });
        for (int j = 0; j < plan.rhs.count; ++j) {  // limbs of rhs
          const int shift = plan.lhs.limb[i].shift + plan.rhs.limb[j].shift;
          for (int64_t p = p0; p < p1; ++p) {             // columns
            for (int64_t m = 0; m < rows; m += K::kMr) {  // rows
              alignas(64) int32_t tile[K::kMr * K::kNr];
              const uint8_t* panel = Panel(block, j, p);
              const auto* start = reinterpret_cast<const int32_t*>(panel);
              K::Run(lhs + m * kLhsStride<K>, reinterpret_cast<const typename K::Rhs*>(start + K::kNr), start,
                     CeilDiv(Depth(block), K::kGroup), tile);
              const int64_t height = Min(K::kMr, rows - m), width = Min(K::kNr, g.n - p * K::kNr);
              if (plan.fits_in_int32) {
                StoreInt32(tile, m0 + m, p * K::kNr, height, width, block);
              } else {
                const bool is_first = block == 0 && i == 0 && j == 0;
                AddInt64(tile, sums + m * kNc + (p - p0) * K::kNr, height, width, shift, is_first);
              }
            }
          }
        }
      }
    }
    if (!plan.fits_in_int32) StoreInt64(sums, m0, rows, p0 * K::kNr, Min(g.n, p1 * K::kNr));
    SpoilNonFinite(bad_rows, m0, rows, p0 * K::kNr, Min(g.n, p1 * K::kNr));
  }

  // Powers of two multiply exactly; the smaller first keeps both steps within float32's range.
  float LowScale() const { return PowerOfTwo(static_cast<int>(Min(g.lhs.exponent, g.rhs.exponent))); }
  float HighScale() const { return PowerOfTwo(static_cast<int>(Max(g.lhs.exponent, g.rhs.exponent))); }

  // Partial sums stay in the output as int32 between depth blocks; the last block converts them.
  void StoreInt32(const int32_t* tile, int64_t m0, int64_t n0, int64_t height, int64_t width,
                  int64_t block) const {
    const float low = LowScale(), high = HighScale();
    const bool is_first = block == 0, is_last = block == blocks - 1;
    for (int64_t r = 0; r < height; ++r) {
      float* out = g.out + (m0 + r) * g.n + n0;
      const int32_t* row = tile + r * K::kNr;
      if (is_first && is_last) {
        for (int64_t c = 0; c < width; ++c) out[c] = static_cast<float>(row[c]) * low * high;
        continue;
      }
      for (int64_t c = 0; c < width; ++c) {
        int32_t sum = 0;
        if (!is_first) __builtin_memcpy(&sum, out + c, 4);
        sum += row[c];
        const float value = static_cast<float>(sum) * low * high;
        __builtin_memcpy(out + c, is_last ? static_cast<const void*>(&value) : &sum, 4);
      }
    }
  }

  void AddInt64(const int32_t* tile, int64_t* sums, int64_t height, int64_t width, int shift,
                bool is_first) const {
    for (int64_t r = 0; r < height; ++r)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t term = static_cast<int64_t>(tile[r * K::kNr + c]) * (int64_t{1} << shift);
        sums[r * kNc + c] = is_first ? term : sums[r * kNc + c] + term;
      }
  }

  void StoreInt64(const int64_t* sums, int64_t m0, int64_t rows, int64_t n0, int64_t n1) const {
    const float low = LowScale(), high = HighScale();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = n0; c < n1; ++c)
        g.out[(m0 + r) * g.n + c] = static_cast<float>(sums[r * kNc + c - n0]) * low * high;
  }

  void SpoilNonFinite(const uint8_t* bad_rows, int64_t m0, int64_t rows, int64_t n0, int64_t n1) const {
    bool any = false;
    for (int64_t c = n0; c < n1; ++c) any |= bad_columns[c] != 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (!bad_rows[r] && !any) continue;
      for (int64_t c = n0; c < n1; ++c)
        if (bad_rows[r] || bad_columns[c]) g.out[(m0 + r) * g.n + c] = __builtin_nanf("");
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
