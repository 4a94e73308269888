#include "plan.h"

#include <algorithm>
#include <cmath>

#include "sizes.h"

namespace jax_apt {
namespace {

constexpr int64_t kInt32Max = 2147483647;
constexpr int64_t kLine = 64;
constexpr int64_t kBlockBytes = 512 * 1024;  // of lhs that a task holds in L2
constexpr int64_t kTasksPerWorker = 4;       // so that none waits long for the last
constexpr int64_t kTapBytes = 8 << 20;       // of images of single taps: they stay in L3
constexpr double kSerialCopied = 1 << 19;    // bytes, while one thread multiplies the terms of `serial`

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
int64_t FloorDiv(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }
int64_t MaxCode(int bits) { return (int64_t{1} << (bits - 1)) - 1; }

// Row-major position of a point.
int64_t Linear(const int64_t* at, const int64_t* size) { return (at[0] * size[1] + at[1]) * size[2] + at[2]; }

// The point after `at`, row-major; false after the last.
bool Next(int64_t* at, const int64_t* size) {
  for (int d = kSpace - 1; d >= 0; --d) {
    if (++at[d] < size[d]) return true;
    at[d] = 0;
  }
  return false;
}

// Unsigned bytes from below until at most `top_bits` are left for the top limb.
Limbs SplitBits(int bits, int top_bits) {
  Limbs limbs{};
  int shift = 0;
  for (; bits - shift > top_bits; shift += 8) limbs.limb[limbs.count++] = {shift, 255};
  limbs.limb[limbs.count++] = {shift, -1};
  // Shifting right rounds down: -(2^(bits-1) - 1) becomes -2^(bits-1-shift).
  limbs.largest = shift == 0 ? MaxCode(bits) : std::max<int64_t>(255, MaxCode(bits - shift) + 1);
  return limbs;
}

Limbs Bytes(int bits) {
  Limbs limbs{};
  for (int shift = 0; shift < bits; shift += 8) limbs.limb[limbs.count++] = {shift, 255};
  return limbs;
}

// Whether the lines of the result are written whole and are too many for the caches.
bool IsStreamed(const Product& product, int64_t nr) {
  constexpr int64_t kMostInCaches = 12 << 20;
  const int64_t out = SizesOf(product.kind, product.geometry).out * int64_t{sizeof(float)};
  const Geometry& g = product.geometry;
  const int64_t row = product.kind == Kind::kInputGradient ? g.in_channels : g.out_channels;
  return out > kMostInCaches && row % (kLine / sizeof(float)) == 0 && row / g.groups % nr == 0;
}

class Planner {
 public:
  Planner(const Product& product, const KernelShape& shape, int workers)
      : g(Merged(product)),
        kind(product.kind),
        workers(workers),
        floats_planes(product.rhs.floats == nullptr ? 0 : LimbCount(product.rhs.bits)) {
    p.shape = shape;
    SplitIntoLimbs(product.lhs.bits, product.rhs.bits);
    p.is_rhs_pixels = kind == Kind::kFilterGradient;
    p.is_lhs_channels = p.is_rhs_pixels;
  }

  Plan Make() {
    for (int d = 0; d < kSpace; ++d) p.result[d] = kind == Kind::kInputGradient ? g.in[d] : g.out[d];
    const int64_t x_group = g.in_channels / g.groups, y_group = g.out_channels / g.groups;
    switch (kind) {
      case Kind::kForward: {
        p.columns = y_group, p.lhs_group_step = x_group;
        p.rhs_lane_step = 1, p.rhs_depth_step = g.out_channels, p.rhs_group_step = y_group;
        p.out_row = g.out_channels, p.out_group_step = y_group;
        LayOutImagesOfX();
        AddForwardPhase(x_group);
        break;
      }
      case Kind::kInputGradient: {
        p.columns = x_group, p.lhs_group_step = y_group, p.is_rhs_along = true;
        p.rhs_lane_step = g.out_channels, p.rhs_depth_step = 1, p.rhs_group_step = y_group;
        p.out_row = g.in_channels, p.out_group_step = x_group;
        LayOutImageOfDy();
        AddInputGradientPhases(x_group, y_group);
        break;
      }
      case Kind::kFilterGradient: {
        p.columns = y_group, p.rhs_group_step = y_group;
        p.out_row = g.out_channels, p.out_group_step = y_group;
        LayOutImagesOfX();
        AddFilterGradientPhase(x_group);
        break;
      }
    }
    p.panels = CeilDiv(p.columns, p.shape.nr);
    for (Phase& phase : p.phases) CountTiles(phase);
    SizePanels();
    ShareOut();
    LayOutScratch();
    return std::move(p);
  }

 private:
  const Geometry g;
  const Kind kind;
  const int workers;
  const int64_t floats_planes;  // of rhs, where it comes as floats
  Plan p{};
  bool are_taps_apart = false;  // each has an image of x of its own
  int64_t reach[kSpace];        // grid points from the first tap to the last
  int64_t cropped[kSpace];      // by negative padding

  // A 1x1 product at every pixel is a matrix product: one long row of pixels.
  static Geometry Merged(const Product& product) {
    Geometry g = product.geometry;
    if (!IsProductOfMatrices(g)) return g;
    g.in[2] = g.out[2] = g.batch * Volume(g.in);
    g.batch = g.in[0] = g.out[0] = g.in[1] = g.out[1] = 1;
    return g;
  }

  // ---- Limbs

  // Bytes: the sum of one pair of limbs must fit, 255 * 128 * depth < 2^31. One limb each may wrap, if the
  // final sum fits: 127 * 127 * depth < 2^31.
  // 16-bit elements: two 16-bit limbs would leave room for one product, so a 16-bit limb meets bytes.
  int64_t safe_depth;

  void SplitIntoLimbs(int lhs_bits, int rhs_bits) {
    if (p.shape.element_bytes == 1) {
      p.lhs_limbs = Bytes(lhs_bits), p.rhs_limbs = Bytes(rhs_bits);
      const bool is_single = p.lhs_limbs.count * p.rhs_limbs.count == 1;
      const bool does_fit = is_single && Depth(g, kind) <= kInt32Max / (127 * 127);
      safe_depth = does_fit ? kInt32Max : kInt32Max / (255 * 128);
      return;
    }
    constexpr int kTopBits[3][2] = {{16, 16}, {16, 8}, {8, 16}};
    constexpr int64_t kMinDepth = 256;  // a product that must be stored more often is not worth its while
    int64_t least = 0;
    for (const auto& top_bits : kTopBits) {
      const Limbs lhs = SplitBits(lhs_bits, top_bits[0]), rhs = SplitBits(rhs_bits, top_bits[1]);
      const int64_t safe = kInt32Max / (lhs.largest * rhs.largest);
      if (safe < kMinDepth || (least != 0 && lhs.count * rhs.count >= least)) continue;
      least = lhs.count * rhs.count;
      p.lhs_limbs = lhs, p.rhs_limbs = rhs, safe_depth = safe;
    }
  }

  // ---- Images

  // Grid point o of the image with remainder f holds x[o * stride + f - pad]; tap t of output pixel o is at
  // point o + t * dilation / stride of the image t * dilation % stride.
  // With taps apart, point o of the image of tap t holds x[o * stride + t * dilation - pad].
  void LayOutImagesOfX() {
    for (int d = 0; d < kSpace; ++d) {
      reach[d] = (g.window[d] - 1) * g.dilation[d] / g.stride[d];
      p.grid[d] = g.out[d] + reach[d];
      p.source[d] = g.in[d], p.step[d] = g.stride[d];
    }
    p.source_channels = g.in_channels;
    if (AreTapsQuickerApart(g.out, Volume(g.stride))) SetTapsApart(g.out);
    int64_t f[kSpace] = {};
    do {
      for (int d = 0; d < kSpace; ++d)
        p.image_shift.push_back(f[d] * (are_taps_apart ? g.dilation[d] : 1) - g.pad[d]);
    } while (Next(f, are_taps_apart ? g.window : g.stride));
    SetLhsSize();
  }

  // Pixel q of dx, with q + pad = (i - cropped) * stride + remainder, is at point i; tap t reads point
  // i + reach - t * dilation / stride. So point o + reach + cropped holds dy[o].
  // With taps apart, point q of the image of tap t holds dy[q + pad - t * dilation].
  void LayOutImageOfDy() {
    for (int d = 0; d < kSpace; ++d) {
      reach[d] = (g.window[d] - 1) * g.dilation[d] / g.stride[d];
      cropped[d] = std::max<int64_t>(0, CeilDiv(-g.pad[d], g.stride[d]));
      p.grid[d] = FloorDiv(g.in[d] - 1 + g.pad[d], g.stride[d]) + cropped[d] + reach[d] + 1;
      p.source[d] = g.out[d], p.step[d] = 1;
    }
    p.source_channels = g.out_channels;
    if (Volume(g.stride) == 1 && AreTapsQuickerApart(g.in, 1)) SetTapsApart(g.in);
    int64_t t[kSpace] = {};
    do {
      for (int d = 0; d < kSpace; ++d)
        p.image_shift.push_back(are_taps_apart ? g.pad[d] - t[d] * g.dilation[d] : -reach[d] - cropped[d]);
    } while (are_taps_apart && Next(t, g.window));
    SetLhsSize();
  }

  // Taps share an image, whose points beside the pixels of the result are computed in vain (or, in a filter
  // gradient, multiply zeros of dy). On small maps these are many: then each tap gets an image without them.
  bool AreTapsQuickerApart(const int64_t* pixels, int64_t images) const {
    const int64_t taps = Volume(g.window);
    if (taps == 1) return true;
    const int64_t last[kSpace] = {pixels[0] - 1, pixels[1] - 1, pixels[2] - 1};
    const int64_t points = Volume(p.grid), computed = p.is_lhs_channels ? points : Linear(last, p.grid) + 1;
    const int64_t beside = computed - Volume(pixels), copied = Volume(pixels) * taps - points * images;
    const double terms = static_cast<double>(beside) * taps * p.columns * p.rhs_limbs.count;
    const int64_t bytes = p.shape.element_bytes * p.lhs_limbs.count * p.source_channels * g.batch;
    return bytes * Volume(pixels) * taps <= kTapBytes &&
           terms / p.shape.serial > p.shape.element_bytes * copied / kSerialCopied;
  }

  void SetTapsApart(const int64_t* pixels) {
    are_taps_apart = true;
    p.is_matrix = !p.is_lhs_channels;
    for (int d = 0; d < kSpace; ++d) p.grid[d] = pixels[d], reach[d] = cropped[d] = 0;
  }

  void SetLhsSize() {
    p.points = g.batch * Volume(p.grid);
    const int64_t images = static_cast<int64_t>(p.image_shift.size()) / kSpace;
    if (p.is_lhs_channels) {  // an odd number of lines apart, so that rows do not share an L1 set
      p.lhs_stride = RoundUp(p.points + Linear(reach, p.grid) + kLine, 2 * kLine) + kLine;
      p.lhs_elements = (images * p.source_channels + p.shape.mr) * p.lhs_stride;
    } else {  // a register block may begin at the last row and read whole units of depth
      p.lhs_stride = p.source_channels;
      p.lhs_elements = (images * p.points + p.shape.mr) * p.lhs_stride + p.shape.depth_unit;
    }
    p.lhs_elements = RoundUp(p.lhs_elements, kLine);
  }

  struct Place {
    int64_t image, point;
  };

  // Where a tap of the first output pixel lies in the images of x.
  Place PlaceOf(const int64_t* tap) const {
    if (are_taps_apart) return {Linear(tap, g.window), 0};
    int64_t point[kSpace], remainder[kSpace];
    for (int d = 0; d < kSpace; ++d) {
      point[d] = tap[d] * g.dilation[d] / g.stride[d];
      remainder[d] = tap[d] * g.dilation[d] % g.stride[d];
    }
    return {Linear(remainder, g.stride), Linear(point, p.grid)};
  }

  // ---- Phases

  void AddForwardPhase(int64_t depth) {
    Phase& phase = AddPhase();
    for (int d = 0; d < kSpace; ++d) {
      phase.low[d] = 0, phase.high[d] = g.out[d] - 1;
      phase.scale[d] = 1, phase.shift[d] = 0;
    }
    std::vector<Tap> taps;
    int64_t t[kSpace] = {};
    do {
      const Place place = PlaceOf(t);
      const int64_t pixel = place.image * p.points + place.point;
      taps.push_back({pixel * p.lhs_stride, Linear(t, g.window) * depth * g.out_channels});
    } while (Next(t, g.window));
    AddTaps(phase, std::move(taps), depth);
    AddImageRuns(phase);
  }

  void AddInputGradientPhases(int64_t x_group, int64_t depth) {
    int64_t f[kSpace] = {};
    do {
      Phase& phase = AddPhase();
      bool is_empty = false;
      for (int d = 0; d < kSpace; ++d) {
        phase.low[d] = cropped[d] - FloorDiv(f[d] - g.pad[d], g.stride[d]);
        phase.high[d] = cropped[d] + FloorDiv(g.in[d] - 1 + g.pad[d] - f[d], g.stride[d]);
        phase.scale[d] = g.stride[d], phase.shift[d] = f[d] - g.pad[d] - cropped[d] * g.stride[d];
        is_empty |= phase.high[d] < phase.low[d];
      }
      if (is_empty) {
        p.phases.pop_back();
        continue;
      }
      std::vector<Tap> taps;
      int64_t t[kSpace] = {};
      do {
        int64_t point[kSpace];
        bool is_met = true;
        for (int d = 0; d < kSpace; ++d) {
          point[d] = reach[d] - t[d] * g.dilation[d] / g.stride[d];
          is_met &= t[d] * g.dilation[d] % g.stride[d] == f[d];
        }
        if (is_met)
          taps.push_back(
              {(are_taps_apart ? Linear(t, g.window) * p.points : Linear(point, p.grid)) * p.lhs_stride,
               Linear(t, g.window) * x_group * g.out_channels});
      } while (Next(t, g.window));
      AddTaps(phase, std::move(taps), depth);
      AddImageRuns(phase);
    } while (Next(f, g.stride));
  }

  void AddFilterGradientPhase(int64_t x_group) {
    Phase& phase = AddPhase();
    const int64_t kc = std::min(p.shape.kc, safe_depth) / kPixelChunk * kPixelChunk;
    phase.first_block = static_cast<int>(p.blocks.size());
    int64_t summed = 0;
    for (int64_t k = 0; k < p.points; k += kc) {
      const int64_t depth = std::min(kc, p.points - k);
      AddBlock(phase, depth, summed);
      p.segments.push_back({k, depth, 0, 0});
    }
    Close(phase);
    phase.first_run = static_cast<int>(p.runs.size());
    int64_t t[kSpace] = {};
    do {
      const Place place = PlaceOf(t);
      const int64_t lhs = place.image * p.source_channels * p.lhs_stride + place.point;
      p.runs.push_back({lhs, x_group, Linear(t, g.window), 0});
    } while (Next(t, g.window));
    phase.runs = static_cast<int>(p.runs.size()) - phase.first_run;
    p.lhs_group_step = x_group * p.lhs_stride;
  }

  Phase& AddPhase() {
    p.phases.push_back({});
    return p.phases.back();
  }

  struct Tap {
    int64_t lhs, rhs;
  };

  // Taps that lie one behind the other become one segment; long segments and many make several blocks.
  void AddTaps(Phase& phase, std::vector<Tap> taps, int64_t depth) {
    std::sort(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) { return a.lhs < b.lhs; });
    phase.first_block = static_cast<int>(p.blocks.size());
    const int64_t most = safe_depth / p.shape.depth_unit * p.shape.depth_unit;
    int64_t summed = 0;
    for (size_t i = 0; i < taps.size() && depth > 0; ++i) {
      const Tap& tap = taps[i];
      Segment* last = i > 0 ? &p.segments.back() : nullptr;
      if (last != nullptr && last->lhs + last->depth == tap.lhs &&
          RoundUp(last->depth + depth, p.shape.depth_unit) <= most && CanGrow(depth, *last, most)) {
        last->depth += depth, last->pieces += 1;
        p.pieces.push_back({tap.rhs});
        const int64_t grown =
            RoundUp(last->depth, p.shape.depth_unit) - RoundUp(last->depth - depth, p.shape.depth_unit);
        p.blocks.back().depth += grown, summed += grown;
        continue;
      }
      for (int64_t k = 0; k < depth; k += most) {
        const int64_t part = std::min(most, depth - k);
        AddToBlocks(phase, part, most, summed);
        p.segments.push_back({tap.lhs + k, part, static_cast<int>(p.pieces.size()), 1});
        p.pieces.push_back({tap.rhs + k * p.rhs_depth_step});
      }
    }
    Close(phase);
  }

  bool CanGrow(int64_t depth, const Segment& last, int64_t most) const {
    const int64_t grown =
        RoundUp(last.depth + depth, p.shape.depth_unit) - RoundUp(last.depth, p.shape.depth_unit);
    return p.blocks.back().depth + grown <= most;
  }

  // Appends a segment to the last block of a phase, or to a new one if the sum might leave int32.
  void AddToBlocks(Phase& phase, int64_t depth, int64_t most, int64_t& summed) {
    const int64_t padded = RoundUp(depth, p.shape.depth_unit);
    if (phase.blocks > 0 && p.blocks.back().depth + padded <= most) {
      p.blocks.back().segments += 1, p.blocks.back().depth += padded, summed += padded;
      return;
    }
    AddBlock(phase, depth, summed);
  }

  // `summed` counts the depth since the sums last left int32.
  void AddBlock(Phase& phase, int64_t depth, int64_t& summed) {
    const int64_t padded = RoundUp(depth, p.shape.depth_unit);
    if (phase.blocks > 0 && summed + padded > safe_depth) p.blocks.back().is_last = true, summed = 0;
    p.blocks.push_back({static_cast<int>(p.segments.size()), 1, 0, padded, false});
    phase.blocks += 1, summed += padded;
  }

  void Close(Phase& phase) {
    if (phase.blocks == 0) {  // nothing to sum: zeros
      p.blocks.push_back({static_cast<int>(p.segments.size()), 0, 0, 0, true});
      phase.blocks = 1;
    }
    phase.depth = 0;
    for (int b = phase.first_block; b < phase.first_block + phase.blocks; ++b) {
      p.blocks[b].rhs = phase.depth * p.shape.nr;
      phase.depth += p.blocks[b].depth;
    }
    p.blocks.back().is_last = true;
  }

  void AddImageRuns(Phase& phase) {
    phase.first_run = static_cast<int>(p.runs.size());
    phase.runs = 1;
    if (p.is_matrix) return p.runs.push_back({0, p.points, 0, 0});
    const int64_t first = Linear(phase.low, p.grid), rows = Linear(phase.high, p.grid) - first + 1;
    for (int64_t n = 0; n < g.batch; ++n)
      p.runs.push_back({(n * Volume(p.grid) + first) * p.lhs_stride, rows, n, 0});
    phase.runs = static_cast<int>(p.runs.size()) - phase.first_run;
  }

  void CountTiles(Phase& phase) {
    int64_t tiles = 0;
    for (int r = phase.first_run; r < phase.first_run + phase.runs; ++r) {
      p.runs[r].tile = tiles;
      tiles += CeilDiv(p.runs[r].rows, p.shape.mr);
    }
  }

  int64_t TilesOf(const Phase& phase) const {
    const RowRun& last = p.runs[phase.first_run + phase.runs - 1];
    return last.tile + CeilDiv(last.rows, p.shape.mr);
  }

  // ---- Panels

  void SizePanels() {
    int64_t rhs = 0;
    for (Phase& phase : p.phases) {
      const int64_t packed =
          RoundUp(phase.depth * p.shape.nr * p.shape.element_bytes, kLine) * p.rhs_limbs.count;
      const int64_t pairs = p.shape.saturates ? sizeof(LargePairs) : 0;
      phase.panel_bytes =
          RoundUp(packed + phase.blocks * (p.shape.nr * int64_t{sizeof(int64_t)} + pairs), kLine);
      phase.rhs_bytes = rhs;
      rhs += p.panels * phase.panel_bytes;
    }
    p.group_rhs_bytes = rhs;
    p.panels_at_once = std::clamp<int64_t>(p.panels / (2 * workers), 1, kPanelsAtOnce);
  }

  // Tasks on columns read all rows, tasks on rows need all panels: what is larger should stay on its core.
  bool DoColumnsStay(int64_t largest_panel) const {
    const int64_t lhs = p.lhs_elements * p.lhs_limbs.count * p.shape.element_bytes;
    return p.is_single_block && !p.is_rhs_pixels && p.panels >= 2 * workers &&
           lhs <= std::max(kBlockBytes, p.panels * largest_panel);
  }

  // ---- Tasks

  // A task holds a block of rows in L2 and takes panel after panel of the columns, or, if the rows are few,
  // some of the panels.
  void ShareOut() {
    p.is_single_block = true, p.is_wide = p.lhs_limbs.count * p.rhs_limbs.count > 1;
    for (const Phase& phase : p.phases) {
      p.is_single_block &= phase.blocks == 1;
      for (int b = phase.first_block; b + 1 < phase.first_block + phase.blocks; ++b)
        p.is_wide |= p.blocks[b].is_last;
    }
    int64_t all_tiles = 0;
    for (const Phase& phase : p.phases) all_tiles += TilesOf(phase);
    int64_t largest_panel = 0;
    for (const Phase& phase : p.phases) largest_panel = std::max(largest_panel, phase.panel_bytes);
    p.is_rhs_own = DoColumnsStay(largest_panel);
    p.is_rhs_matrix = p.is_rhs_pixels && IsProductOfMatrices(g);
    p.rhs_parts = p.is_rhs_matrix && g.groups == 1 && workers > 1 ? PartsOf(p.phases[0].blocks) : 1;
    for (int i = 0; i < static_cast<int>(p.phases.size()); ++i)
      p.is_rhs_own ? ShareOutColumns(i, largest_panel) : ShareOut(i, all_tiles);
  }

  int64_t PartsOf(int64_t blocks) const {
    return std::clamp<int64_t>(2 * workers / std::max<int64_t>(1, blocks), 1, std::max<int64_t>(1, p.panels));
  }

  void ShareOutColumns(int index, int64_t largest_panel) {
    const int64_t line = std::max<int64_t>(2, kLine / p.shape.nr);  // panels whose codes fill one
    const int64_t fit = std::clamp<int64_t>(kBlockBytes / largest_panel, line, kPanelsAtOnce);
    const int64_t some = std::min(fit, CeilDiv(p.panels, kTasksPerWorker * workers));
    for (int64_t group = 0; group < g.groups; ++group)
      for (int64_t panel = 0; panel < p.panels; panel += some)
        p.tasks.push_back(
            {index, group, 0, TilesOf(p.phases[index]), panel, std::min(some, p.panels - panel)});
  }

  void ShareOut(int index, int64_t all_tiles) {
    const Phase& phase = p.phases[index];
    const int64_t tiles = TilesOf(phase), wanted = kTasksPerWorker * workers;
    const int64_t own_taps = are_taps_apart ? Volume(g.window) : 1;
    const int64_t row_bytes = p.is_lhs_channels ? std::min(p.shape.kc, p.points) : p.lhs_stride * own_taps;
    const int64_t tile_bytes = p.shape.mr * row_bytes * p.shape.element_bytes * p.lhs_limbs.count;
    int64_t most_tiles = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(tile_bytes, 1));
    int64_t most_panels = p.panels;
    if (!p.is_single_block) {  // the sums stay in L2 as well
      const int64_t square = kBlockBytes / SumsBytesPerTile();
      most_panels = std::min(most_panels, std::max<int64_t>(1, square / std::min(tiles, most_tiles)));
      most_tiles = std::min(most_tiles, std::max<int64_t>(1, square / most_panels));
    }
    int64_t row_tasks = CeilDiv(tiles, most_tiles);
    const int64_t whole = CeilDiv(p.panels, most_panels) * g.groups;
    if (workers > 1) {  // rows first: a task on fewer panels reads its rows as often as one on all
      const int64_t least =
          std::min<int64_t>(tiles, CeilDiv(wanted * tiles, std::max<int64_t>(all_tiles, 1)));
      if (tiles >= wanted * 4 || p.panels == 1) row_tasks = std::max(row_tasks, CeilDiv(least, whole));
    }
    const int64_t tiles_per_task = CeilDiv(tiles, row_tasks);
    row_tasks = CeilDiv(tiles, tiles_per_task);
    int64_t panel_tasks = CeilDiv(p.panels, most_panels);
    if (workers > 1 && row_tasks * whole < wanted)
      panel_tasks = std::max(panel_tasks, std::min(p.panels, CeilDiv(wanted, row_tasks * g.groups)));
    const int64_t panels_per_task = CeilDiv(p.panels, panel_tasks);
    for (int64_t group = 0; group < g.groups; ++group)
      for (int64_t tile = 0; tile < tiles; tile += tiles_per_task)
        for (int64_t panel = 0; panel < p.panels; panel += panels_per_task)
          p.tasks.push_back({index, group, tile, std::min(tiles_per_task, tiles - tile), panel,
                             std::min(panels_per_task, p.panels - panel)});
  }

  // ---- Scratch

  // int32 sums of each pair of limbs, and 64-bit sums if they leave int32.
  int64_t SumsBytesPerTile() const {
    const int64_t pairs = p.lhs_limbs.count * p.rhs_limbs.count;
    return p.shape.mr * p.shape.nr * (4 * pairs + (p.is_wide ? 8 : 0));
  }

  void LayOutScratch() {
    const int64_t element = p.shape.element_bytes;
    p.is_lhs_direct = IsLhsDirect();
    p.lhs_bytes = p.is_lhs_direct ? 0 : RoundUp(p.lhs_elements * p.lhs_limbs.count * element, kLine);
    p.rhs_bytes = p.is_rhs_own ? 0 : p.group_rhs_bytes * g.groups;
    int64_t slots = 1;
    if (!p.is_single_block)
      for (const Task& task : p.tasks) slots = std::max(slots, task.tiles * task.panels);
    int64_t temporary = p.is_rhs_pixels ? kPixelChunk * std::max(g.in_channels, g.out_channels) : 0;
    if (p.is_rhs_along)
      for (const Segment& s : p.segments)
        temporary = std::max(temporary, kWordColumns * RoundUp(s.depth, p.shape.depth_unit));
    p.temporary_bytes = RoundUp((temporary + kLine) * element, kLine);
    p.own_panels_offset = p.temporary_bytes + RoundUp(slots * SumsBytesPerTile(), kLine);
    p.worker_bytes = p.own_panels_offset;
    if (p.is_rhs_own) {
      int64_t own = 0;
      for (const Task& task : p.tasks) own = std::max(own, task.panels * p.phases[task.phase].panel_bytes);
      p.worker_bytes += own;
    }
    p.planes_offset = p.worker_bytes;
    p.worker_bytes += RoundUp(kPixelChunk * g.out_channels * floats_planes, kLine);
    p.lhs_offset = 0;
    p.rhs_offset = p.lhs_bytes;
    p.worker_offset = p.rhs_offset + p.rhs_bytes;
    p.scratch_bytes = p.worker_offset + workers * p.worker_bytes;
  }

  // Bytes of a matrix whose rows and depth need no filling up are read where they are.
  bool IsLhsDirect() const {
    return p.is_matrix && IsProductOfMatrices(g) && p.shape.element_bytes == 1 && !p.shape.is_nonnegative &&
           (p.lhs_stride / g.groups) % p.shape.depth_unit == 0 && p.points % p.shape.row_unit == 0;
  }
};

}  // namespace

const char* FindError(const Product& product, int64_t* value) {
  for (const Operand* operand : {&product.lhs, &product.rhs}) {
    *value = operand->bits;
    if (operand->bits < 2 || operand->bits > 24) return "bits must be in 2..24";
    *value = operand->exponent;
    if (operand->exponent < -126 || operand->exponent > 126) return "exponent must be in -126..126";
  }
  *value = product.geometry.groups;
  if (product.rhs.floats != nullptr &&
      !(product.kind == Kind::kFilterGradient && IsProductOfMatrices(product.geometry) && *value == 1))
    return "only dy of a matrix product's filter gradient may be floats; groups must be 1";
  *value = SumBits(product);
  return *value > 62 ? "lhs bits + rhs bits - 2 + log2(depth) must be at most 62" : nullptr;
}

Plan MakePlan(const Product& product, const KernelShape& shape, int workers) {
  constexpr int64_t kMaxWinogradScratch = int64_t{1} << 27;
  Plan p{};
  if (IsWinograd(product, shape)) p.winograd = MakeWinogradPlan(product, shape, workers, &p.scratch_bytes);
  p.is_winograd = p.scratch_bytes != 0 && p.scratch_bytes <= kMaxWinogradScratch;
  if (!p.is_winograd && IsDepthwise(product.geometry)) {
    p.is_depthwise = true;
    p.depthwise = MakeDepthwisePlan(product, shape.element_bytes == 1, workers, &p.scratch_bytes);
  } else if (!p.is_winograd) {
    p = Planner(product, shape, workers).Make();
    p.are_sums_small = SumBits(product) <= 51;
  }
  p.is_out_streamed = IsStreamed(product, shape.nr);
  return p;
}

}  // namespace jax_apt
