// How one product is computed: what is packed where, which depth is summed in which order, who does what.
//
// All three products of a convolution become one form. Rows are pixels (or, for the filter gradient, the
// input channels of a tap), and a row reads its depth from `Segment`s: stretches of memory at fixed offsets
// from the row's first element. So no patch need be copied: the next row begins `lhs_stride` elements on, and
// each tap of the filter is one more offset.
//
//   forward           rows: pixels of y    depth: taps x channels of x      lhs: padded image of x
//   input gradient    rows: pixels of dx   depth: taps x channels of y      lhs: padded image of dy
//   filter gradient   rows: taps x channels of x    depth: pixels           lhs: that image, channels first
//
// An image lies on a grid in whose linear order a tap is a constant offset; what falls on padding is computed
// and not stored. A stride s splits x into s images per dimension, one for each remainder of the
// position (of dx, for the input gradient, into s sets of output pixels): its taps are then dense.
//
// On small maps much falls on padding, so that it is quicker to copy pixels once for each tap: image t then
// holds what tap t meets at the pixels of the result, and no others.
#ifndef JAX_APT_XLA_OPS_PLAN_H_
#define JAX_APT_XLA_OPS_PLAN_H_

#include <vector>

#include "depthwise_plan.h"
#include "product.h"
#include "winograd_plan.h"

namespace jax_apt {

constexpr int64_t kPixelChunk = 64;   // pixels that are rearranged at once
constexpr int64_t kPanelsAtOnce = 8;  // of rhs that are packed together
constexpr int64_t kWordColumns = 4;   // columns of rhs that are rearranged at once

struct Limb {  // of kernels on 16-bit elements: (code >> shift) & mask
  int shift;
  int32_t mask;
};

struct Limbs {
  Limb limb[kMaxLimbs];
  int count;
  int64_t largest;  // bound on the magnitude of any limb; not used for bytes
};

struct Piece {  // of a segment's depth: the channels of one tap
  int64_t rhs;  // element of w at which it begins
};

struct Segment {
  int64_t lhs;    // elements from a row's first
  int64_t depth;  // elements
  int first_piece, pieces;
};

struct Block {  // of the depth: summed in int32
  int first_segment, segments;
  int64_t rhs;    // elements from a panel's first
  int64_t depth;  // with every segment filled up
  bool is_last;   // before the sums leave int32
};

// Of a block of a panel, for kernels that add two products in 16 bits: the neighbours of rhs so large that
// this may saturate.
struct LargePairs {
  static constexpr int64_t kMost = 63;
  int64_t count;  // more than are listed: too many
  struct Pair {
    int64_t lhs;  // elements from a row's first
    int64_t rhs;  // elements from the block's first
  } pair[kMost];
};

struct Phase {  // pixels of the result that meet the same taps
  int first_block, blocks;
  int64_t depth;      // of a panel, all blocks
  int64_t rhs_bytes;  // where its panels begin
  int64_t panel_bytes;
  int64_t low[kSpace], high[kSpace];     // grid points that are pixels of the result
  int64_t scale[kSpace], shift[kSpace];  // pixel = point * scale + shift
  int first_run, runs;
};

struct RowRun {  // rows that lie `lhs_stride` apart
  int64_t lhs;   // element of the first row's first
  int64_t rows;
  int64_t place;  // image of the batch, or tap
  int64_t tile;   // number of its first register block in the phase
};

struct Task {
  int phase;
  int64_t group, first_tile, tiles, first_panel, panels;
};

struct Plan {
  bool is_out_streamed;  // past the caches: the result is too large for them

  // Winograd: only this, `is_out_streamed` and `scratch_bytes` count.
  bool is_winograd;
  WinogradPlan winograd;

  // Depthwise: only this and `scratch_bytes` count.
  bool is_depthwise;
  DepthwisePlan depthwise;

  KernelShape shape;
  Limbs lhs_limbs, rhs_limbs;

  // The image of lhs: grid point g of image i holds source pixel g * step + image_shift[i], or zero.
  bool is_lhs_direct;            // a row-major matrix that is read where it is
  bool is_lhs_channels;          // channels first
  bool is_matrix;                // rows are the result's, one behind the other: no point falls on padding
  int64_t grid[kSpace], points;  // points: batch * grid
  int64_t source[kSpace], step[kSpace], source_channels;
  std::vector<int64_t> image_shift;  // (images, kSpace)
  int64_t lhs_stride, lhs_elements;  // of one limb

  // The pixels of dy as the depth of a filter gradient; otherwise rhs is w.
  bool is_rhs_pixels;
  bool is_rhs_matrix;  // these pixels are the rows of a matrix: they lie one behind the other
  int64_t rhs_parts;   // tasks that share the panels of a block of pixels
  bool is_rhs_own;     // each task packs the panels that it multiplies, which then never change cores
  bool is_rhs_along;   // the depth of w is contiguous in memory, not its columns
  int64_t rhs_lane_step, rhs_depth_step, rhs_group_step;  // elements of w (or dy)

  int64_t result[kSpace];   // pixels of y or dx
  int64_t columns, panels;  // per group
  int64_t panels_at_once;   // that one task packs
  int64_t lhs_group_step;   // elements of lhs
  int64_t out_row, out_group_step;

  std::vector<Piece> pieces;
  std::vector<Segment> segments;
  std::vector<Block> blocks;
  std::vector<Phase> phases;
  std::vector<RowRun> runs;
  std::vector<Task> tasks;
  bool is_single_block;  // no phase has two: nothing is kept between blocks
  bool is_wide;          // several limbs, or sums that leave int32
  bool are_sums_small;   // below 2^51

  // Scratch, in bytes from its start.
  int64_t lhs_bytes, rhs_bytes, worker_bytes, temporary_bytes, own_panels_offset, group_rhs_bytes;
  int64_t planes_offset;  // in a worker's: of dy, where it comes as floats
  int64_t lhs_offset, rhs_offset, worker_offset, scratch_bytes;
};

// What is wrong with a product, or null. `value` receives the offending value.
const char* FindError(const Product& product, int64_t* value);

Plan MakePlan(const Product& product, const KernelShape& shape, int workers);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_PLAN_H_
