#include "winograd_plan.h"

#include <algorithm>

namespace jax_apt {
namespace {

constexpr int64_t kInt32Max = 2147483647;
constexpr int64_t kLanes = 16, kPlanes = 36;
constexpr int64_t kTasksPerWorker = 4;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Returns the bytes of scratch.
int64_t PlanTiles(const KernelShape& shape, int workers, WinogradPlan& w) {
  constexpr int64_t kWholeDepth = 224, kBlockDepth = 176;  // at most 229: see winograd_loops.h
  const int64_t most_tiles = w.lhs_limbs == 1 ? 30 : 18;   // whose inputs stay in L2
  w.blocks = w.source_channels <= kWholeDepth ? 1 : CeilDiv(w.source_channels, kBlockDepth);
  w.block_depth = RoundUp(CeilDiv(w.source_channels, w.blocks), kLanes);
  w.tiles_per_group = std::min(most_tiles, w.tiles);
  w.groups = CeilDiv(w.tiles, w.tiles_per_group);
  w.is_shared = w.groups < kTasksPerWorker * workers;
  const int64_t weights = w.rhs_limbs * w.panels * w.blocks * kPlanes * w.block_depth * kLanes * 2;
  const int64_t input = w.lhs_limbs * kPlanes * (w.tiles_per_group * w.blocks * w.block_depth + 32) * 2;
  const int64_t products = w.limbs * kPlanes * (w.tiles_per_group + shape.mr) * kLanes * 4;
  w.input_offset = weights;
  w.worker_offset = w.input_offset + input * (w.is_shared ? w.groups : workers);
  w.worker_bytes = products + w.limbs * w.tiles_per_group * 16 * kLanes * 4;
  return w.worker_offset + workers * w.worker_bytes;
}

int64_t PlanFilterGradient(const Geometry& g, const KernelShape& shape, int workers, WinogradPlan& w) {
  constexpr int64_t kMaxRows = 96;  // whose products stay in L2
  w.pairs = CeilDiv(w.tiles, 2);
  w.input_offset = w.lhs_limbs * kPlanes * w.pairs * 2 * RoundUp(g.in_channels, kLanes) * 2;
  w.worker_offset = w.input_offset + w.rhs_limbs * w.panels * kPlanes * w.pairs * 2 * kLanes * 2;
  const int64_t row_tasks = std::max(CeilDiv(g.in_channels, kMaxRows), CeilDiv(2 * workers, w.panels));
  const int64_t rows = w.rows_per_task = RoundUp(CeilDiv(g.in_channels, row_tasks), shape.mr);
  w.worker_bytes = rows * kLanes * (9 * int64_t{sizeof(int64_t)} + kPlanes * int64_t{sizeof(int32_t)});
  return w.worker_offset + workers * w.worker_bytes;
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
  const int64_t* result = product.kind == Kind::kInputGradient ? g.in : g.out;
  const int64_t used = result[1] * result[2], made = RoundUp(result[1], 4) * RoundUp(result[2], 4);
  constexpr int64_t kMinChannels = 16, kMaxChannels = kInt32Max / (9 * 127 * 128);
  return 2 * used > made && std::min(g.in_channels, g.out_channels) >= kMinChannels &&
         std::max(g.in_channels, g.out_channels) <= kMaxChannels;
}

WinogradPlan MakeWinogradPlan(const Product& product, const KernelShape& shape, int workers,
                              int64_t* scratch_bytes) {
  const Geometry& g = product.geometry;
  const bool is_forward = product.kind != Kind::kInputGradient;
  WinogradPlan w{};
  w.lhs_limbs = LimbCount(product.lhs.bits), w.rhs_limbs = LimbCount(product.rhs.bits);
  w.limbs = std::max(w.lhs_limbs, w.rhs_limbs);
  for (int d = 0; d < kSpace; ++d) {
    w.source[d] = is_forward ? g.in[d] : g.out[d];
    w.result[d] = is_forward ? g.out[d] : g.in[d];
  }
  w.source_channels = is_forward ? g.in_channels : g.out_channels;
  w.columns = is_forward ? g.out_channels : g.in_channels;
  w.panels = CeilDiv(w.columns, shape.nr);
  // The first dimension is one more of the batch.
  w.tile_rows = CeilDiv(w.result[1], 4), w.tile_columns = CeilDiv(w.result[2], 4);
  w.tiles = g.batch * w.result[0] * w.tile_rows * w.tile_columns;
  for (int d = 0; d < 2; ++d) w.pad[d] = is_forward ? g.pad[d + 1] : 2 - g.pad[d + 1];
  const bool is_filter = product.kind == Kind::kFilterGradient;
  *scratch_bytes = is_filter ? PlanFilterGradient(g, shape, workers, w) : PlanTiles(shape, workers, w);
  return w;
}

}  // namespace jax_apt
