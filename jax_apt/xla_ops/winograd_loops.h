// Exact integer Winograd F(4x4, 3x3): a 3x3 convolution of stride 1 with 36 instead of 144 multiplications
// per 4 x 4 pixels (Lavin and Gray, arXiv 1509.09308). Included by unit.h inside each ISA unit's own
// anonymous namespace; for units that multiply 16-bit elements and whose int32 sums wrap.
//
//   Y = A^T [ (G w G^T) . (B^T d B) ] A / 576      for a tile d of 6 x 6 pixels, sums over channels inside [
//   ]
//
// with the rows of G scaled by 24, but its last by 8, for which the last entry of A is 3. All of B, G and A
// are integers: transformed codes of 8 bits are at most 10 * 10 * 128 = 12800 and 12 * 12 * 128 = 18432, so
// 16-bit elements hold them. 576 Y is taken modulo 2^32: times the inverse of 9 that is 64 Y, which fits
// int32 for the channels of a block, and is shifted. The result is that of the direct product, bit for bit.
//
// The input gradient is the same convolution of dy, with w reversed and its channels swapped. The filter
// gradient is the transposed algorithm, summed over tiles: W = G^T [ (A dy A^T) . (B^T x B) ] G / 576, with
// transformed gradients of at most 15 * 15 * 128 = 28800; 64 W fits int32 for 128 tiles.
//
// Codes of more than 8 bits are 256 * high + low, limbs of -128..128 and -128..127, and so are the results;
// only one of the two operands has two limbs, so no product of limbs exceeds 127 * 128.

// A row or column of 6, as B^T, G, A^T, A and G^T take it to 6, 6, 4, 6 and 3. Elements are vectors.
struct WinogradTransforms {
  static constexpr int64_t kLanes = 16, kHalf = kLanes / 2, kPlanes = 36;
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  using SignedBytes = int8_t __attribute__((vector_size(kLanes)));
  using Codes = int16_t __attribute__((vector_size(2 * kLanes)));
  using Sums = uint32_t __attribute__((vector_size(4 * kLanes / 2)));
  using SignedSums = int32_t __attribute__((vector_size(sizeof(Sums))));
  using Floats = float __attribute__((vector_size(sizeof(Sums))));
  using Doubles = double __attribute__((vector_size(2 * sizeof(Sums))));
  using Totals = int64_t __attribute__((vector_size(2 * sizeof(Sums))));
  using UnsignedTotals = uint64_t __attribute__((vector_size(2 * sizeof(Sums))));

  static void Input(const Codes* a, Codes* out) {  // B^T
    const Codes p = a[4] - 4 * a[2], q = a[3] - 4 * a[1], r = a[4] - a[2], s = 2 * (a[3] - a[1]);
    out[0] = 4 * a[0] - 5 * a[2] + a[4], out[1] = p + q, out[2] = p - q;
    out[3] = r + s, out[4] = r - s, out[5] = 4 * a[1] - 5 * a[3] + a[5];
  }

  static void Filter(const Codes* a, Codes* out) {  // G
    const Codes outer = a[0] + 4 * a[2];
    out[0] = 6 * a[0], out[1] = -4 * (a[0] + a[1] + a[2]), out[2] = -4 * (a[0] - a[1] + a[2]);
    out[3] = outer + 2 * a[1], out[4] = outer - 2 * a[1], out[5] = 8 * a[2];
  }

  static void Output(const Sums* m, Sums* out) {  // A^T
    const Sums p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
    out[0] = m[0] + p + r, out[1] = q + 2 * s, out[2] = p + 4 * r, out[3] = q + 8 * s + 3 * m[5];
  }

  static void Gradient(const Codes* a, Codes* out) {  // A
    const Codes even = a[0] + a[2], odd = a[1] + a[3], far = a[0] + 4 * a[2], wide = 2 * a[1] + 8 * a[3];
    out[0] = a[0], out[1] = even + odd, out[2] = even - odd, out[3] = far + wide, out[4] = far - wide;
    out[5] = 3 * a[3];
  }

  static void FilterOutput(const Sums* m, Sums* out) {  // G^T
    const Sums p = m[1] + m[2], q = m[2] - m[1], r = m[3] + m[4], s = m[3] - m[4];
    out[0] = 6 * m[0] - 4 * p + r, out[1] = 4 * q + 2 * s, out[2] = 4 * (r - p) + 8 * m[5];
  }

  // Transforms columns, then rows: kFrom x kFrom elements, `at(i, j)`, become kTo x kTo, `give(i, j, value)`.
  template <int kFrom, int kTo, class Vector, class At, class Give>
  static inline __attribute__((always_inline)) void Both(void (*rows)(const Vector*, Vector*), At at,
                                                         Give give) {
    Vector half[kTo][kFrom];
    for (int j = 0; j < kFrom; ++j) {
      Vector column[kFrom], result[kTo];
      for (int i = 0; i < kFrom; ++i) column[i] = at(i, j);
      rows(column, result);
      for (int i = 0; i < kTo; ++i) half[i][j] = result[i];
    }
    for (int i = 0; i < kTo; ++i) {
      Vector result[kTo];
      rows(half[i], result);
      for (int j = 0; j < kTo; ++j) give(i, j, result[j]);
    }
  }

  // 64 times the result, from 576 times it modulo 2^32, and that shifted.
  static SignedSums Divided(Sums sum) {
    constexpr uint32_t kInverseOf9 = 0x38E38E39;
    return reinterpret_cast<SignedSums>(sum * kInverseOf9) >> 6;
  }

  static Bytes ReadBytes(const uint8_t* from, int64_t count, uint8_t rest) {
    Bytes bytes = Bytes{} + rest;
    if (count >= kLanes) {
      __builtin_memcpy(&bytes, from, kLanes);
    } else {
      for (int64_t i = 0; i < count; ++i) bytes[i] = from[i];
    }
    return bytes;
  }

  // A limb of 16 codes from `at` on, of which `count` are there; zeros after them.
  static Codes ReadCodes(const Operand& operand, int limb, int64_t at, int64_t count) {
    const bool is_single = operand.bits <= 8;
    const Bytes low = ReadBytes(operand.plane[0] + at, count, is_single ? 128 : 0);
    if (is_single) return __builtin_convertvector(low, Codes) - 128;
    if (limb == 0) return __builtin_convertvector(reinterpret_cast<SignedBytes>(low), Codes);
    const Bytes high = ReadBytes(operand.plane[1] + at, count, 128);
    return __builtin_convertvector(high, Codes) - 128 + (__builtin_convertvector(low, Codes) >> 7);
  }

  static constexpr int64_t kBeside = -1;  // a pixel beside the images, which is zero

  // Where the size x size pixels from (y, x) on of a canvas begin in the images.
  template <int kSize>
  static void FindPixels(const WinogradPlan& w, const int64_t* image, int64_t channels, int64_t canvas,
                         int64_t y, int64_t x, int64_t* pixels) {
    const int64_t first = canvas * w.images_on_canvas;
    int64_t number[kSize], column[kSize];
    for (int64_t j = 0; j < kSize; ++j) FindPlace(x + j, image[1], w.gap, number[j], column[j]);
    for (int64_t i = 0; i < kSize; ++i) {
      int64_t line, row;
      FindPlace(y + i, image[0], w.gap, line, row);
      for (int64_t j = 0; j < kSize; ++j) {
        const int64_t n = first + line * w.across + number[j];
        const bool is_inside = row != kBeside && column[j] != kBeside && number[j] < w.across && n < w.images;
        *pixels++ = is_inside ? ((n * image[0] + row) * image[1] + column[j]) * channels : kBeside;
      }
    }
  }

  struct Place {
    int64_t canvas, y, x;  // the first pixel
  };

  static Place PlaceOf(const WinogradPlan& w, int64_t tile) {
    return {tile / w.tile_columns / w.tile_rows, tile / w.tile_columns % w.tile_rows * 4,
            tile % w.tile_columns * 4};
  }

  // In which image of a row of them a canvas has a pixel, and where there.
  static void FindPlace(int64_t at, int64_t size, int64_t gap, int64_t& number, int64_t& pixel) {
    number = 0, pixel = at < 0 ? kBeside : at;
    if (at < size) return;
    number = at / (size + gap), pixel = at % (size + gap);
    if (pixel >= size) pixel = kBeside;
  }

  static Codes ReadPixel(const Operand& operand, int limb, int64_t pixel, int64_t c, int64_t count) {
    return pixel == kBeside ? Codes{} : ReadCodes(operand, limb, pixel + c, count);
  }

  static void Interleave(Codes even, Codes odd, int16_t* words) {
    const Codes first = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                                23),
                last = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                               30, 15, 31);
    __builtin_memcpy(words, &first, sizeof(first));
    __builtin_memcpy(words + kLanes, &last, sizeof(last));
  }

  template <class Vector>
  static void StoreSome(Vector value, int64_t count, float* to) {
    if (count >= static_cast<int64_t>(sizeof(value) / sizeof(float))) {
      __builtin_memcpy(to, &value, sizeof(value));
    } else {
      for (int64_t c = 0; c < count; ++c) to[c] = value[c];
    }
  }

  template <class Vector>
  static Vector Load(const void* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  }
};

template <class K>
class Winograd : WinogradTransforms {
 public:
  Winograd(const Plan& plan, const Product& product, uint8_t* scratch)
      : w(plan.winograd),
        product(product),
        scratch(scratch),
        is_streamed(plan.is_out_streamed && IsAligned(product.out)) {}

  void Run(Parallel& parallel) {
    input_tasks = w.is_shared ? CeilDiv(w.tiles, kTilesPerTask) : 0;
    const int64_t weights = w.is_rhs_own ? 0 : w.rhs_limbs * w.panels * w.blocks;
    const auto prepare = [](void* self, int64_t task, int) { Self(self)->Prepare(task); };
    const auto multiply = [](void* self, int64_t task, int worker) { Self(self)->Multiply(task, worker); };
    const int64_t tasks = w.is_rhs_own ? w.panels : w.is_shared ? w.groups * w.panels : w.groups;
    parallel.Run({input_tasks + weights, prepare}, {tasks, multiply}, this);
  }

 private:
  static_assert(K::kNr == kLanes && sizeof(typename K::Lhs) == 2, "panels of 16 columns");
  static_assert(kWordLanes == kHalf, "vectors of 32 bytes");

  static constexpr int64_t kTilesPerTask = 4;

  const WinogradPlan& w;
  const Product& product;
  uint8_t* const scratch;
  const bool is_streamed;
  int64_t input_tasks = 0;

  static Winograd* Self(void* self) { return static_cast<Winograd*>(self); }
  bool IsForward() const { return product.kind == Kind::kForward; }

  // Of a block of a panel: (limbs, planes, depth, 16 columns), in words of two depths
  int16_t* Weights(int64_t panel, int64_t block, int worker) const {
    const int64_t elements = w.rhs_limbs * WeightLimb();
    if (w.is_rhs_own) return reinterpret_cast<int16_t*>(Own(worker) + w.weights_offset);
    return reinterpret_cast<int16_t*>(scratch) + (panel * w.blocks + block) * elements;
  }
  int64_t WeightLimb() const { return kPlanes * w.block_depth * kLanes; }
  uint8_t* Own(int worker) const { return scratch + w.worker_offset + worker * w.worker_bytes; }
  // (limbs, planes, tiles, depth); the planes lie a line further apart, so that they do not share an L1 set
  int16_t* InputOf(int64_t group, int worker, int limb) const {
    auto* start = reinterpret_cast<int16_t*>(scratch + w.input_offset);
    return start + ((w.is_shared ? group : worker) * w.lhs_limbs + limb) * kPlanes * InputPlane();
  }
  int64_t InputPlane() const { return w.tiles_per_group * Depth() + 32; }
  int64_t Depth() const { return w.blocks * w.block_depth; }
  // Of a worker: (limbs, planes, tiles, 16 columns)
  int32_t* Products(int worker, int limb) const {
    return reinterpret_cast<int32_t*>(Own(worker)) + limb * kPlanes * ProductPlane();
  }
  int64_t ProductPlane() const { return (w.tiles_per_group + K::kMr) * kLanes; }
  // Sums over blocks: (groups, limbs, tiles, 16 pixels, 16 columns)
  int32_t* Totals(int worker, int64_t group, int limb, int64_t tile) const {
    const int64_t number = w.is_rhs_own ? group : 0;
    return Products(worker, w.limbs) + ((number * w.limbs + limb) * w.tiles_per_group + tile) * 16 * kLanes;
  }

  void Prepare(int64_t task) {
    if (task < input_tasks) {
      const int64_t first = task * kTilesPerTask;
      return TransformInput(first, Min(w.tiles, first + kTilesPerTask), 0);
    }
    task -= input_tasks;
    const int64_t block = task % w.blocks, panel = task / w.blocks % w.panels;
    TransformWeights(static_cast<int>(task / w.blocks / w.panels), panel, block, Weights(panel, block, 0));
  }

  // ---- Weights

  void TransformWeights(int limb, int64_t panel, int64_t block, int16_t* weights) const {
    const int64_t first = block * w.block_depth;
    weights += limb * WeightLimb();
    for (int64_t k = 0; k < w.block_depth; k += kLanes) {
      int16_t taps[9][kLanes][kLanes];  // [depth][column]
      for (int t = 0; t < 9; ++t) {
        if (IsForward()) {
          ReadTap(limb, t, first + k, panel * kLanes, taps[t]);
        } else {
          ReadTapAlong(limb, 8 - t, first + k, panel * kLanes, taps[t]);
        }
      }
      for (int64_t i = 0; i < kLanes; i += 2) {
        Codes even[kPlanes], odd[kPlanes];
        TransformFilter(taps, i, even), TransformFilter(taps, i + 1, odd);
        for (int plane = 0; plane < kPlanes; ++plane)
          Interleave(even[plane], odd[plane], weights + (plane * w.block_depth + k + i) * kLanes);
      }
    }
  }

  // 16 depths of 16 columns of a tap; zeros beside the filter.
  void ReadTap(int limb, int tap, int64_t depth, int64_t column, int16_t (*out)[kLanes]) const {
    const int64_t from = (tap * w.source_channels + depth) * w.columns + column;
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool is_there = depth + i < w.source_channels;
      const Codes codes =
          is_there ? ReadCodes(product.rhs, limb, from + i * w.columns, w.columns - column) : Codes{};
      __builtin_memcpy(out[i], &codes, sizeof(codes));
    }
  }

  // The same where the depth is contiguous in memory.
  void ReadTapAlong(int limb, int tap, int64_t depth, int64_t column, int16_t (*out)[kLanes]) const {
    uint8_t across[2][kLanes][kLanes];
    Operand operand = product.rhs;
    for (int plane = 0; plane < LimbCount(operand.bits); ++plane) {
      const uint8_t rest = plane + 1 == LimbCount(operand.bits) ? 128 : 0;
      const uint8_t* from = product.rhs.plane[plane] + (tap * w.columns + column) * w.source_channels + depth;
      uint8_t along[kLanes][kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t count = column + i < w.columns ? w.source_channels - depth : 0;
        const Bytes bytes = ReadBytes(from + i * w.source_channels, count, rest);
        __builtin_memcpy(along[i], &bytes, sizeof(bytes));
      }
      Transpose(along[0], kLanes, kLanes, across[plane][0], kLanes);
      operand.plane[plane] = across[plane][0];
    }
    for (int64_t k = 0; k < kLanes; ++k) {
      const Codes codes = ReadCodes(operand, limb, k * kLanes, kLanes);
      __builtin_memcpy(out[k], &codes, sizeof(codes));
    }
  }

  static void TransformFilter(const int16_t (*taps)[kLanes][kLanes], int64_t depth, Codes* out) {
    Both<3, 6, Codes>(
        Filter, [&](int i, int j) { return Load<Codes>(taps[3 * i + j][depth]); },
        [&](int i, int j, Codes value) { out[6 * i + j] = value; });
  }

  // ---- Input

  void TransformInput(int64_t first, int64_t end, int worker) const {
    for (int64_t tile = first; tile < end; ++tile) {
      const Place at = PlaceOf(w, tile);
      int64_t pixels[kPlanes];
      FindPixels<6>(w, w.source, w.source_channels, at.canvas, at.y - w.pad[0], at.x - w.pad[1], pixels);
      const int64_t group = tile / w.tiles_per_group;
      for (int limb = 0; limb < w.lhs_limbs; ++limb)
        TransformTile(pixels, limb, InputOf(group, worker, limb) + tile % w.tiles_per_group * Depth());
    }
  }

  void TransformTile(const int64_t* pixels, int limb, int16_t* out) const {
    for (int64_t c = 0; c < Depth(); c += kLanes)
      Both<6, 6, Codes>(
          Input,
          [&](int i, int j) {
            return ReadPixel(product.lhs, limb, pixels[6 * i + j], c, w.source_channels - c);
          },
          [&](int i, int j, Codes value) {
            __builtin_memcpy(out + (6 * i + j) * InputPlane() + c, &value, sizeof(value));
          });
  }

  // ---- Products

  void Multiply(int64_t task, int worker) const {
    MultiplyTask(task, worker);
    FinishStreams();
  }

  void MultiplyTask(int64_t task, int worker) const {
    if (w.is_rhs_own) return MultiplyPanel(task, 0, w.groups, worker);
    if (w.is_shared) return MultiplyPanel(task % w.panels, task / w.panels, task / w.panels + 1, worker);
    TransformInput(task * w.tiles_per_group, Min(w.tiles, (task + 1) * w.tiles_per_group), worker);
    for (int64_t panel = 0; panel < w.panels; ++panel) MultiplyPanel(panel, task, task + 1, worker);
  }

  void MultiplyPanel(int64_t panel, int64_t first, int64_t end, int worker) const {
    for (int64_t block = 0; block < w.blocks; ++block) {
      int16_t* weights = Weights(panel, block, worker);
      for (int limb = 0; w.is_rhs_own && limb < w.rhs_limbs; ++limb)
        TransformWeights(limb, panel, block, weights);
      for (int64_t group = first; group < end; ++group) {
        for (int64_t plane = 0; plane < kPlanes; ++plane)
          for (int limb = 0; limb < w.limbs; ++limb)
            MultiplyPlane(group, worker, block, weights, plane, limb);
        for (int limb = 0; limb < w.limbs; ++limb)
          for (int64_t t = 0; t < Tiles(group); ++t)
            TransformProducts(Products(worker, limb) + t * kLanes, block == 0,
                              Totals(worker, group, limb, t));
      }
    }
    for (int64_t group = first; group < end; ++group)
      for (int64_t t = 0; t < Tiles(group); ++t)
        Store(group * w.tiles_per_group + t, panel, Totals(worker, group, 0, t),
              w.limbs == 1 ? nullptr : Totals(worker, group, 1, t));
  }

  int64_t Tiles(int64_t group) const { return Min(w.tiles_per_group, w.tiles - group * w.tiles_per_group); }

  void MultiplyPlane(int64_t group, int worker, int64_t block, const int16_t* weights, int64_t plane,
                     int limb) const {
    const int16_t* input = InputOf(group, worker, w.lhs_limbs == 1 ? 0 : limb) + plane * InputPlane();
    weights += (w.rhs_limbs == 1 ? 0 : limb) * WeightLimb() + plane * w.block_depth * kLanes;
    const Segment segment{0, w.block_depth, 0, 0};
    for (int64_t t = 0; t < Tiles(group); t += K::kMr)
      K::Run(input + t * Depth() + block * w.block_depth, Depth(), &segment, 1, weights,
             static_cast<int>(Min(K::kMr, Tiles(group) - t)), true,
             Products(worker, limb) + plane * ProductPlane() + t * kLanes);
  }

  // Adds a tile's 16 pixels to their totals.
  void TransformProducts(const int32_t* products, bool is_first, int32_t* totals) const {
    for (int64_t c = 0; c < kLanes; c += kHalf)
      Both<6, 4, Sums>(
          Output, [&](int i, int j) { return Load<Sums>(products + (6 * i + j) * ProductPlane() + c); },
          [&](int i, int j, Sums sum) {
            int32_t* total = totals + (4 * i + j) * kLanes + c;
            const SignedSums before = is_first ? SignedSums{} : Load<SignedSums>(total);
            const SignedSums value = before + Divided(sum);
            __builtin_memcpy(total, &value, sizeof(value));
          });
  }

  // `high`, if it is there, counts 256 times as much.
  void Store(int64_t tile, int64_t panel, const int32_t* low_limb, const int32_t* high_limb) const {
    const float low = PowerOfTwo(Min(product.lhs.exponent, product.rhs.exponent));
    const float high = PowerOfTwo(Max(product.lhs.exponent, product.rhs.exponent));
    const Place at = PlaceOf(w, tile);
    int64_t pixels[16];
    FindPixels<4>(w, w.result, w.columns, at.canvas, at.y, at.x, pixels);
    const int64_t width = Min(kLanes, w.columns - panel * kLanes);
    for (int64_t i = 0; i < 16; ++i) {
      if (pixels[i] == kBeside) continue;
      float* out = product.out + pixels[i] + panel * kLanes;
      for (int64_t c = 0; c < width; c += kHalf) {
        const int64_t k = i * kLanes + c;
        const Floats value =
            Rounded(low_limb + k, high_limb == nullptr ? nullptr : high_limb + k) * low * high;
        is_streamed ? StreamVector(out + c, value) : StoreSome(value, width - c, out + c);
      }
    }
  }

  // Rounded once: a double holds the sum of two limbs.
  static Floats Rounded(const int32_t* low, const int32_t* high) {
    const auto last = Load<SignedSums>(low);
    if (high == nullptr) return __builtin_convertvector(last, Floats);
    const Doubles first = __builtin_convertvector(Load<SignedSums>(high), Doubles);
    return __builtin_convertvector(first * 256 + __builtin_convertvector(last, Doubles), Floats);
  }
};

// The filter gradient. Input and gradient tiles lie in pairs, so that a word holds two tiles of a channel:
//
//   input      (limbs, planes, 48 channels each, pairs of tiles, 48 channels, 2)
//   gradient   (limbs, panels, planes, pairs of tiles, 16 channels, 2)
//
// so that a register block reads what lies together. A task sums some input channels of a panel over all
// tiles that are transformed, `kTiles` at a time.
template <class K>
class WinogradFilterGradient : WinogradTransforms {
 public:
  WinogradFilterGradient(const Plan& plan, const Product& product, uint8_t* scratch)
      : w(plan.winograd), g(product.geometry), product(product), scratch(scratch) {}

  void Run(Parallel& parallel) {
    const auto prepare = [](void* self, int64_t task, int) { Self(self)->Prepare(task); };
    const auto sum = [](void* self, int64_t task, int worker) { Self(self)->Sum(task, worker); };
    for (; first_pair < w.pairs; first_pair += w.pairs_at_once)
      parallel.Run({CeilDiv(Pairs(), kPairsPerTask), prepare},
                   {CeilDiv(g.in_channels, w.rows_per_task) * w.panels, sum}, this);
  }

 private:
  static constexpr int64_t kTiles = kWinogradTiles, kPairsPerTask = 4;
  static_assert(K::kNr == kLanes && K::kGroup == 2 && sizeof(typename K::Lhs) == 2, "words of 16 columns");
  static_assert(kWinogradRows % K::kMr == 0 && kWinogradRows % kLanes == 0, "whole blocks and vectors");

  const WinogradPlan& w;
  const Geometry& g;
  const Product& product;
  uint8_t* const scratch;
  int64_t first_pair = 0;  // of those that are transformed

  static WinogradFilterGradient* Self(void* self) { return static_cast<WinogradFilterGradient*>(self); }

  int64_t Pairs() const { return Min(w.pairs_at_once, w.pairs - first_pair); }

  // Channels that lie together with channel c.
  int64_t Together(int64_t c) const {
    return Min(kWinogradRows, RoundUp(g.in_channels, kLanes) - c / kWinogradRows * kWinogradRows);
  }
  int16_t* InputOf(int limb, int64_t plane, int64_t pair, int64_t c) const {
    const int64_t rest = c % kWinogradRows, at = (c - rest) * w.pairs_at_once + pair * Together(c) + rest;
    return reinterpret_cast<int16_t*>(scratch) + (limb * kPlanes + plane) * w.x_plane + 2 * at;
  }
  int16_t* GradientOf(int limb, int64_t panel, int64_t plane, int64_t pair) const {
    return reinterpret_cast<int16_t*>(scratch + w.input_offset) +
           ((limb * w.panels + panel) * kPlanes + plane) * w.dy_plane + 2 * pair * kLanes;
  }
  int64_t* TotalsOf(int64_t task, int worker) const {
    const int64_t number = w.are_totals_kept ? task : worker;
    return reinterpret_cast<int64_t*>(scratch + w.totals_offset) + number * w.rows_per_task * 9 * kLanes;
  }

  void Prepare(int64_t task) {
    for (int64_t pair = task * kPairsPerTask; pair < Min(Pairs(), (task + 1) * kPairsPerTask); ++pair) {
      int64_t x[2][36], dy[2][16];
      for (int64_t i = 0; i < 2; ++i) FindTile(2 * (first_pair + pair) + i, x[i], dy[i]);
      for (int limb = 0; limb < w.lhs_limbs; ++limb)
        for (int64_t c = 0; c < g.in_channels; c += kLanes)
          TransformPair<6>(Input, product.lhs, limb, x, c, g.in_channels - c,
                           [&](int plane) { return InputOf(limb, plane, pair, c); });
      for (int limb = 0; limb < w.rhs_limbs; ++limb)
        for (int64_t panel = 0; panel < w.panels; ++panel)
          TransformPair<4>(Gradient, product.rhs, limb, dy, panel * kLanes, g.out_channels - panel * kLanes,
                           [&](int plane) { return GradientOf(limb, panel, plane, pair); });
    }
  }

  // A tile after the last is on a canvas after the last: zeros.
  void FindTile(int64_t tile, int64_t* x, int64_t* dy) const {
    const Place at = PlaceOf(w, tile);
    FindPixels<6>(w, w.source, g.in_channels, at.canvas, at.y - w.pad[0], at.x - w.pad[1], x);
    FindPixels<4>(w, w.result, g.out_channels, at.canvas, at.y, at.x, dy);
  }

  template <int kFrom, class To, size_t kPixels>
  static void TransformPair(void (*rows)(const Codes*, Codes*), const Operand& operand, int limb,
                            const int64_t (*pixels)[kPixels], int64_t c, int64_t count, To to) {
    Codes tiles[2][kPlanes];
    for (int i = 0; i < 2; ++i)
      Both<kFrom, 6, Codes>(
          rows, [&](int j, int k) { return ReadPixel(operand, limb, pixels[i][kFrom * j + k], c, count); },
          [&](int j, int k, Codes value) { tiles[i][6 * j + k] = value; });
    for (int plane = 0; plane < kPlanes; ++plane) Interleave(tiles[0][plane], tiles[1][plane], to(plane));
  }

  void Sum(int64_t task, int worker) const {
    const int64_t panel = task % w.panels, first = task / w.panels * w.rows_per_task;
    const int64_t rows = Min(w.rows_per_task, g.in_channels - first);
    int64_t* totals = TotalsOf(task, worker);
    auto* products = reinterpret_cast<int32_t*>(scratch + w.worker_offset + worker * w.worker_bytes);
    for (int64_t i = 0; first_pair == 0 && i < rows * 9 * kLanes; ++i) totals[i] = 0;
    for (int64_t pair = 0; pair < Pairs(); pair += kTiles / 2)
      for (int limb = 0; limb < w.limbs; ++limb) {
        for (int plane = 0; plane < kPlanes; ++plane)
          for (int64_t row = 0; row < rows; row += K::kMr)
            MultiplyRows(plane, limb, pair, panel, first + row, Min(K::kMr, rows - row),
                         products + (plane * w.rows_per_task + row) * kLanes);
        for (int64_t row = 0; row < rows; ++row)
          AddRow(products + row * kLanes, 8 * limb, totals + row * 9 * kLanes);
      }
    if (first_pair + Pairs() < w.pairs) return;
    for (int64_t row = 0; row < rows; ++row) Store(first + row, panel, totals + row * 9 * kLanes);
  }

  void MultiplyRows(int plane, int limb, int64_t pair, int64_t panel, int64_t row, int64_t rows,
                    int32_t* products) const {
    const int x_limb = w.lhs_limbs == 1 ? 0 : limb, dy_limb = w.rhs_limbs == 1 ? 0 : limb;
    K::RunPairs(InputOf(x_limb, plane, pair, row), 2, 2 * Together(row), Min(kTiles / 2, Pairs() - pair),
                GradientOf(dy_limb, panel, plane, pair), static_cast<int>(rows), products);
  }

  void AddRow(const int32_t* products, int shift, int64_t* totals) const {
    for (int64_t c = 0; c < kLanes; c += kHalf)
      Both<6, 3, Sums>(
          FilterOutput,
          [&](int i, int j) { return Load<Sums>(products + (6 * i + j) * w.rows_per_task * kLanes + c); },
          [&](int i, int j, Sums sum) {
            int64_t* total = totals + (3 * i + j) * kLanes + c;
            const auto value = reinterpret_cast<UnsignedTotals>(
                __builtin_convertvector(Divided(sum), Totals));  // unsigned: a negative shift is undefined
            const UnsignedTotals now = Load<UnsignedTotals>(total) + (value << shift);
            __builtin_memcpy(total, &now, sizeof(now));
          });
  }

  void Store(int64_t row, int64_t panel, const int64_t* totals) const {
    const float low = PowerOfTwo(Min(product.lhs.exponent, product.rhs.exponent));
    const float high = PowerOfTwo(Max(product.lhs.exponent, product.rhs.exponent));
    const int64_t width = Min(kLanes, g.out_channels - panel * kLanes);
    for (int64_t t = 0; t < 9; ++t) {
      float* out = product.out + (t * g.in_channels + row) * g.out_channels + panel * kLanes;
      for (int64_t c = 0; c < width; c += kWordLanes / 2) {
        const auto sums = Load<LongVector>(totals + t * kLanes + c);
        StoreSome(RoundSmallLongs(sums) * low * high, width - c, out + c);
      }
    }
  }
};

template <class K>
void RunWinograd(const Plan& plan, const Product& product, uint8_t* scratch, Parallel& parallel) {
  if (product.kind == Kind::kFilterGradient)
    return WinogradFilterGradient<K>(plan, product, scratch).Run(parallel);
  Winograd<K>(plan, product, scratch).Run(parallel);
}
