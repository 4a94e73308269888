// How a 3x3 convolution is computed by Winograd's algorithm; see winograd_loops.h.
#ifndef JAX_APT_XLA_OPS_WINOGRAD_PLAN_H_
#define JAX_APT_XLA_OPS_WINOGRAD_PLAN_H_

#include "product.h"

namespace jax_apt {

constexpr int64_t kWinogradTiles = 128;  // whose filter gradients are summed at once: at most 130

struct WinogradPlan {
  int64_t source[kSpace], source_channels;  // of the image that is read in tiles of 6 x 6 pixels
  int64_t result[kSpace], columns, panels;  // of what is made in tiles of 4 x 4, and its channels
  int64_t pad[2];
  int64_t tile_rows, tile_columns, tiles;  // of an image, and of all images
  int lhs_limbs, rhs_limbs, limbs;         // of which one has two at most; the more of both

  // Forward, input gradient.
  int64_t blocks, block_depth;      // of the channels that are summed
  int64_t groups, tiles_per_group;  // tiles that are transformed together
  bool is_shared;                   // few groups: tasks are panels of a group

  // Filter gradient.
  int64_t pairs;          // of tiles
  int64_t rows_per_task;  // input channels

  int64_t input_offset, worker_offset, worker_bytes;  // of scratch
};

// Whether the algorithm is exact for a product, and quicker than the direct one.
bool IsWinograd(const Product& product, const KernelShape& shape);

WinogradPlan MakeWinogradPlan(const Product& product, const KernelShape& shape, int workers,
                              int64_t* scratch_bytes);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_WINOGRAD_PLAN_H_
