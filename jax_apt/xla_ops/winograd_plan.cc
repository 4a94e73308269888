#include "winograd_plan.h"

#include <algorithm>

namespace jax_apt {
namespace {

constexpr int64_t kInt32Max = 2147483647;
constexpr int64_t kLanes = 16, kPlanes = 36;
constexpr int64_t kTasksPerWorker = 4;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Few tiles: one canvas for all images, if their padding can be shared, else one for each.
void LayOutTiles(WinogradPlan& w) {
  constexpr int64_t kMostAcross = 64, kBeyondTiles = 8;
  w.across = w.images_on_canvas = 1, w.gap = kBeyondTiles;
  w.tile_rows = CeilDiv(w.result[0], 4), w.tile_columns = CeilDiv(w.result[1], 4);
  w.tiles = w.images * w.tile_rows * w.tile_columns;
  for (int d = 0; d < 2; ++d)
    if (w.pad[d] != 1 || w.source[d] != w.result[d]) return;
  const auto tiles = [](int64_t images, int64_t size) { return CeilDiv(images * (size + 1) - 1, 4); };
  for (int64_t across = 1; across <= std::min(kMostAcross, w.images); ++across) {
    const int64_t rows = tiles(CeilDiv(w.images, across), w.result[0]), columns = tiles(across, w.result[1]);
    if (rows * columns >= w.tiles) continue;
    w.across = across, w.images_on_canvas = w.images, w.gap = 1;
    w.tile_rows = rows, w.tile_columns = columns, w.tiles = rows * columns;
  }
}

// Returns the bytes of scratch.
int64_t PlanTiles(const KernelShape& shape, int workers, WinogradPlan& w) {
  constexpr int64_t kWholeDepth = 224, kBlockDepth = 176;  // at most 229: see winograd_loops.h
  const int64_t most_tiles = w.lhs_limbs == 1 ? 30 : 18;   // whose inputs stay in L2
  w.blocks = w.source_channels <= kWholeDepth ? 1 : CeilDiv(w.source_channels, kBlockDepth);
  w.block_depth = RoundUp(CeilDiv(w.source_channels, w.blocks), kLanes);
  w.tiles_per_group = std::min(most_tiles, w.tiles);
  w.groups = CeilDiv(w.tiles, w.tiles_per_group);
  w.is_shared = w.groups < kTasksPerWorker * workers;
  w.is_rhs_own = w.is_shared && w.panels >= kTasksPerWorker * workers;
  const int64_t block = w.rhs_limbs * kPlanes * w.block_depth * kLanes * 2;
  const int64_t weights = w.is_rhs_own ? 0 : w.panels * w.blocks * block;
  const int64_t input = w.lhs_limbs * kPlanes * (w.tiles_per_group * w.blocks * w.block_depth + 32) * 2;
  w.input_offset = weights;
  w.worker_offset = w.input_offset + input * (w.is_shared ? w.groups : workers);
  const int64_t products = w.limbs * kPlanes * (w.tiles_per_group + shape.mr) * kLanes * 4;
  const int64_t totals = w.limbs * w.tiles_per_group * 16 * kLanes * 4;
  w.weights_offset = products + totals * (w.is_rhs_own ? w.groups : 1);
  w.worker_bytes = w.weights_offset + (w.is_rhs_own ? block : 0);
  return w.worker_offset + workers * w.worker_bytes;
}

int64_t PlanFilterGradient(const Geometry& g, const KernelShape& shape, int workers, WinogradPlan& w) {
  constexpr int64_t kMaxRows = 48;           // whose products stay in L2
  constexpr int64_t kBytesAtOnce = 1 << 20;  // of transformed tiles for each worker: about as L2 holds
  const int64_t channels = RoundUp(g.in_channels, kLanes);
  w.pairs = CeilDiv(w.tiles, 2);
  const int64_t words = w.pairs * kPlanes * (w.lhs_limbs * channels + w.rhs_limbs * w.panels * kLanes);
  const int64_t ranges = CeilDiv(words * 4, workers * kBytesAtOnce);
  w.pairs_at_once = std::min(w.pairs, RoundUp(CeilDiv(w.pairs, ranges), kWinogradTiles / 2));
  w.x_plane = w.pairs_at_once * 2 * channels + 32;  // a line further apart: not in the same L1 set
  w.dy_plane = w.pairs_at_once * 2 * kLanes + 32;
  w.input_offset = w.lhs_limbs * kPlanes * w.x_plane * 2;
  w.totals_offset = w.input_offset + w.rhs_limbs * w.panels * kPlanes * w.dy_plane * 2;
  const int64_t row_tasks = std::max(CeilDiv(g.in_channels, kMaxRows), CeilDiv(2 * workers, w.panels));
  const int64_t rows = w.rows_per_task = RoundUp(CeilDiv(g.in_channels, row_tasks), shape.mr);
  const int64_t totals = rows * kLanes * 9 * int64_t{sizeof(int64_t)};
  w.are_totals_kept = w.pairs > w.pairs_at_once;
  w.worker_offset =
      w.totals_offset + totals * (w.are_totals_kept ? CeilDiv(g.in_channels, rows) * w.panels : workers);
  w.worker_bytes = rows * kLanes * kPlanes * int64_t{sizeof(int32_t)};
  return w.worker_offset + workers * w.worker_bytes;
}

WinogradPlan Describe(const Product& product, int64_t nr) {
  const Geometry& g = product.geometry;
  const bool is_forward = product.kind != Kind::kInputGradient;
  WinogradPlan w{};
  w.lhs_limbs = LimbCount(product.lhs.bits), w.rhs_limbs = LimbCount(product.rhs.bits);
  w.limbs = std::max(w.lhs_limbs, w.rhs_limbs);
  for (int d = 0; d < 2; ++d) {
    w.source[d] = is_forward ? g.in[d + 1] : g.out[d + 1];
    w.result[d] = is_forward ? g.out[d + 1] : g.in[d + 1];
    w.pad[d] = is_forward ? g.pad[d + 1] : 2 - g.pad[d + 1];
  }
  w.source_channels = is_forward ? g.in_channels : g.out_channels;
  w.columns = is_forward ? g.out_channels : g.in_channels;
  w.panels = CeilDiv(w.columns, nr);
  w.images = g.batch * g.out[0];  // the first dimension is one more of the batch
  LayOutTiles(w);
  return w;
}

}  // namespace

// A 3x3 convolution of stride 1 in two dimensions, or a gradient of one, with codes of 8 bits, or of 16 on
// one side, and enough pixels and channels for the transforms to pay.
bool IsWinograd(const Product& product, const KernelShape& shape) {
  const Geometry& g = product.geometry;
  if (!shape.has_winograd || g.groups != 1) return false;
  if (LimbCount(product.lhs.bits) * LimbCount(product.rhs.bits) > 2) return false;
  if (g.window[0] != 1 || g.window[1] != 3 || g.window[2] != 3 || g.in[0] != g.out[0] || g.pad[0] != 0)
    return false;
  for (int d = 0; d < kSpace; ++d)
    if (g.stride[d] != 1 || (d > 0 && g.dilation[d] != 1)) return false;
  constexpr int64_t kMinChannels = 16, kMaxChannels = kInt32Max / (9 * 127 * 128);
  if (std::min(g.in_channels, g.out_channels) < kMinChannels ||
      std::max(g.in_channels, g.out_channels) > kMaxChannels)
    return false;
  const WinogradPlan w = Describe(product, shape.nr);
  constexpr int64_t kMaxPixels = 1 << 28;  // whose filter gradient, below 2^22 each, is less than 2^51
  const int64_t pixels = w.images * w.result[0] * w.result[1];
  // Few tiles do not pay for transforming w, or, of a filter gradient, for transforming it back.
  const int64_t min_tiles = product.kind == Kind::kFilterGradient ? 48 : 8;
  return pixels <= kMaxPixels && w.tiles >= min_tiles && 2 * pixels > w.tiles * 16;
}

WinogradPlan MakeWinogradPlan(const Product& product, const KernelShape& shape, int workers,
                              int64_t* scratch_bytes) {
  WinogradPlan w = Describe(product, shape.nr);
  *scratch_bytes = product.kind == Kind::kFilterGradient
                       ? PlanFilterGradient(product.geometry, shape, workers, w)
                       : PlanTiles(shape, workers, w);
  return w;
}

}  // namespace jax_apt
