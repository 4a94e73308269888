#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace jax_apt {
namespace {

constexpr size_t kAlignment = 64, kHugePage = size_t{1} << 21;
constexpr size_t kMostBlocks = 4;  // kept; as many calls at once find one

struct Block {
  uint8_t* data;
  size_t bytes;
};

std::mutex& Mutex() {
  static std::mutex mutex;
  return mutex;
}

std::vector<Block>& Kept() {
  static auto* kept = new std::vector<Block>;  // never destroyed: a call may outlive static objects
  return *kept;
}

Block Allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(alignment, bytes));
#ifdef __linux__
  if (data != nullptr && alignment == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

}  // namespace

Scratch::Scratch(int64_t bytes) {
  const auto wanted = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  {
    const std::lock_guard<std::mutex> lock(Mutex());
    auto best = Kept().end();  // the smallest that is large enough
    for (auto it = Kept().begin(); it != Kept().end(); ++it)
      if (it->bytes >= wanted && (best == Kept().end() || it->bytes < best->bytes)) best = it;
    if (best != Kept().end()) {
      data_ = best->data, bytes_ = best->bytes;
      Kept().erase(best);
      return;
    }
  }
  const Block block = Allocate(wanted);
  data_ = block.data, bytes_ = block.bytes;
}

Scratch::~Scratch() {
  Block dropped{data_, bytes_};
  {
    const std::lock_guard<std::mutex> lock(Mutex());
    Kept().push_back(dropped);
    dropped = {nullptr, 0};
    if (Kept().size() > kMostBlocks) {
      const auto smallest = std::min_element(
          Kept().begin(), Kept().end(), [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
      dropped = *smallest;
      Kept().erase(smallest);
    }
  }
  std::free(dropped.data);
}

}  // namespace jax_apt
