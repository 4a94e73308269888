#include "batch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "team.h"

namespace jax_apt {
namespace {

// Products larger than this are split among the threads themselves; smaller ones are handed out whole.
constexpr int64_t kSplitMultiplyAdds = 16 * kSerialMultiplyAdds;
constexpr size_t kAlignment = 64;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Share {  // what the tasks of a batch need
  const Kernels& kernels;
  const std::vector<Gemm>& gemms;
  char* scratch;
  size_t bytes;  // of one worker
  int64_t gemms_per_task;
};

void RunShare(void* context, int64_t task, int worker) {
  const Share& share = *static_cast<const Share*>(context);
  const int64_t count = static_cast<int64_t>(share.gemms.size());
  const int64_t begin = task * share.gemms_per_task, end = std::min(count, begin + share.gemms_per_task);
  Serial serial;
  for (int64_t i = begin; i < end; ++i)
    share.kernels.run(share.gemms[i], share.scratch + worker * share.bytes, serial);
}

void RunWhole(const Kernels& kernels, const std::vector<Gemm>& gemms, char* scratch, size_t bytes,
              Parallel& parallel) {
  const int64_t count = static_cast<int64_t>(gemms.size());
  const int64_t tasks = std::min<int64_t>(count, 8 * parallel.workers());
  Share share{kernels, gemms, scratch, bytes, (count + tasks - 1) / tasks};
  parallel.Run((count + share.gemms_per_task - 1) / share.gemms_per_task, RunShare, &share);
}

// Bytes that any of the products needs: they differ in their formats.
size_t ScratchBytes(const Kernels& kernels, const std::vector<Gemm>& gemms, int workers) {
  size_t bytes = kAlignment;
  for (const Gemm& g : gemms) bytes = std::max(bytes, kernels.scratch_bytes(g, workers));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

const char* FindFormatError(const Gemm& g, int64_t* value) {
  for (const Operand* operand : {&g.lhs, &g.rhs}) {
    *value = operand->bits;
    if (operand->bits < 2 || operand->bits > 24) return "bits must be in 2..24";
    *value = operand->exponent;
    if (operand->exponent < -126 || operand->exponent > 126) return "exponent must be in -126..126";
  }
  int depth_bits = 0;
  while ((int64_t{1} << depth_bits) < g.k) ++depth_bits;
  *value = g.lhs.bits + g.rhs.bits - 2 + depth_bits;
  return *value > 62 ? "lhs bits + rhs bits - 2 + log2(depth) must be at most 62" : nullptr;
}

bool RunBatch(const Kernels& kernels, const std::vector<Gemm>& gemms, Parallel& parallel) {
  if (gemms.empty() || gemms[0].m == 0 || gemms[0].n == 0) return true;
  const bool is_whole =
      gemms.size() > 1 && gemms[0].m * gemms[0].n * std::max<int64_t>(gemms[0].k, 1) < kSplitMultiplyAdds;
  const size_t bytes = ScratchBytes(kernels, gemms, is_whole ? 1 : parallel.workers());
  const size_t copies = is_whole ? parallel.workers() : 1;
  std::unique_ptr<void, Free> scratch(std::aligned_alloc(kAlignment, copies * bytes));
  if (scratch == nullptr) return false;
  if (is_whole) {
    RunWhole(kernels, gemms, static_cast<char*>(scratch.get()), bytes, parallel);
  } else {
    for (const Gemm& g : gemms) kernels.run(g, scratch.get(), parallel);
  }
  return true;
}

}  // namespace jax_apt
