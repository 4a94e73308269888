// How a depthwise convolution is computed; see depthwise_loops.h.
#ifndef JAX_APT_XLA_OPS_DEPTHWISE_PLAN_H_
#define JAX_APT_XLA_OPS_DEPTHWISE_PLAN_H_

#include <vector>

#include "product.h"

namespace jax_apt {

constexpr int kMaxTaps = 128;  // of a filter
constexpr int kMostGroup = 4;  // codes in a word
constexpr int kMaxHeldRows = 512;
constexpr int64_t kChannelUnit = 16;  // channels that lie side by side are filled up to a multiple of it

struct WordTaps {       // taps of a row of the filter whose products one instruction adds
  int64_t offset;       // column of the first one
  int tap[kMostGroup];  // -1: none
};

struct PixelPhase {  // pixels first + i * step of a row of the result: they meet the same taps
  int64_t first, count;
  int first_taps, taps;
};

// Pixel i of a phase and its WordTaps w meet the columns i * stride + w.offset + k * spacing of a row of lhs,
// one word. For a filter gradient the pixels are dy's, taps have an offset each, and a word holds what one
// tap meets at successive pixels.
struct DepthwisePlan {
  int64_t group;                           // codes in a word: 4, 2 or 1 (see depthwise_words.h)
  int64_t safe_terms;                      // that a sum surely holds
  int64_t source[kSpace], pixels[kSpace];  // of lhs; of the result, or of dy

  int64_t step, stride, spacing;
  std::vector<WordTaps> taps;
  std::vector<PixelPhase> phases;
  int64_t first_column;            // of the words of a stretch whose first pixel is 0
  std::vector<uint8_t> is_needed;  // columns from it on: whether any pixel reads the word there

  // Tasks: stretches of the pixels of a row (of each phase) x rows x channels.
  int64_t stretch, stretches, rows, row_tasks, blocks, block_tasks;
  int64_t block;      // channels whose rows are held at once
  int64_t padded;     // all channels, filled up
  int64_t held_rows;  // of lhs, for each plane of the filter
  bool is_ring;       // they are neighbours, else one for each row of the filter

  // Scratch: filter words [phase taps][filter row][padded], what to add for the offset of bytes
  // [phase][filter row][padded], the code 0 and, of each worker, held rows, a row of dy, sums, totals.
  int64_t offset_at, zeros_at, worker_at, worker_bytes;
  int64_t row_words, dy_at, sums_at, totals_at;  // of one held row; bytes from a worker's first
};

bool IsDepthwise(const Geometry& geometry);  // with loops of its own

// `has_bytes`: the ISA multiplies bytes. Sets the scratch that it needs.
DepthwisePlan MakeDepthwisePlan(const Product& product, bool has_bytes, int workers, int64_t* scratch_bytes);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_DEPTHWISE_PLAN_H_
