// How a 3x3 convolution is computed by Winograd's algorithm; see winograd_loops.h.
#ifndef JAX_APT_XLA_OPS_WINOGRAD_PLAN_H_
#define JAX_APT_XLA_OPS_WINOGRAD_PLAN_H_

#include "product.h"

namespace jax_apt {

constexpr int64_t kWinogradTiles = 128;  // whose filter gradients are summed at once: at most 130
constexpr int64_t kWinogradRows = 48;    // input channels that lie together: whole register blocks

// Tiles of 4 x 4 pixels lie on canvases. Each image may be one, or all images are on one together, where that
// takes fewer tiles: with a row or column of zeros between two, which serves both as padding.
struct WinogradPlan {
  int64_t source[2], source_channels;  // pixels of an image that is read in tiles of 6 x 6, and its channels
  int64_t result[2], columns, panels;  // of one that is made in tiles of 4 x 4
  int64_t pad[2];
  int64_t images, across, gap;  // side by side on a canvas, and pixels between two
  int64_t images_on_canvas;
  int64_t tile_rows, tile_columns, tiles;  // of a canvas, and of all
  int lhs_limbs, rhs_limbs, limbs;         // of which one has two at most; the more of both

  // Forward, input gradient.
  int64_t blocks, block_depth;      // of the channels that are summed
  int64_t groups, tiles_per_group;  // tiles that are transformed together
  bool is_shared;                   // few groups: tasks are panels of a group
  bool is_rhs_own;                  // or of all groups; each transforms its weights itself
  int64_t weights_offset;           // of a worker's scratch

  // Filter gradient.
  int64_t pairs, pairs_at_once;  // of tiles; what is transformed, multiplied and added up before the next
  int64_t rows_per_task;         // input channels
  int64_t x_plane, dy_plane;     // elements
  bool are_totals_kept;          // of all tasks; else of the workers

  int64_t input_offset, totals_offset, worker_offset, worker_bytes;  // of scratch
};

// Whether the algorithm is exact for a product, and quicker than the direct one.
bool IsWinograd(const Product& product, const KernelShape& shape);

WinogradPlan MakeWinogradPlan(const Product& product, const KernelShape& shape, int workers,
                              int64_t* scratch_bytes);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_WINOGRAD_PLAN_H_
