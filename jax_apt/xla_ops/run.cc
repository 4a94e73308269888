#include "run.h"

#include <algorithm>

#include "plan.h"
#include "scratch.h"
#include "sizes.h"
#include "team.h"

namespace jax_apt {
namespace {

// What takes one thread as long as it takes to wake another: multiply-adds of groups, whose kernels are
// slower than the full ones, and codes read and results written, which take long where sums are short.
constexpr double kSerialInGroups = 1e6, kSerialElements = 1 << 19;

struct Share {  // what the tasks of a batch need
  const Kernels& kernels;
  const std::vector<Product>& products;
  const std::vector<Plan>& plans;
  uint8_t* scratch;
  int64_t bytes;  // of one worker
  int64_t per_task;
};

void RunShare(void* context, int64_t task, int worker) {
  const Share& share = *static_cast<const Share*>(context);
  const auto count = static_cast<int64_t>(share.products.size());
  Serial serial;
  for (int64_t i = task * share.per_task; i < std::min(count, (task + 1) * share.per_task); ++i)
    share.kernels.run(share.plans[share.plans.size() == 1 ? 0 : i], share.products[i],
                      share.scratch + worker * share.bytes, serial);
}

// A plan depends on the geometry and the widths: one serves all products if their widths are equal.
std::vector<Plan> MakePlans(const Kernels& kernels, const std::vector<Product>& products, int workers) {
  std::vector<Plan> plans{MakePlan(products[0], kernels.shape, workers)};
  const auto is_alike = [&](const Product& p) {
    return p.lhs.bits == products[0].lhs.bits && p.rhs.bits == products[0].rhs.bits;
  };
  if (std::all_of(products.begin(), products.end(), is_alike)) return plans;
  for (size_t i = 1; i < products.size(); ++i) plans.push_back(MakePlan(products[i], kernels.shape, workers));
  return plans;
}

bool IsNonnegative(const uint8_t* bytes, int64_t count) {
  constexpr int64_t kRun = 4096;
  for (int64_t start = 0; start < count; start += kRun) {
    uint8_t all = 255;
    for (int64_t i = start; i < std::min(count, start + kRun); ++i) all &= bytes[i];
    if (all < 128) return false;
  }
  return true;
}

// Whether at most 1 code in 16 exceeds 64, by looking at about `most` of them. Gradients, which may be floats
// still, are bell-shaped.
bool AreSmall(const Product& product, int64_t most) {
  if (product.rhs.bits > 8) return false;
  if (product.rhs.floats != nullptr) return true;
  constexpr int64_t kRun = 512;
  const int64_t count = SizesOf(product.kind, product.geometry).rhs;
  const int64_t runs = std::max<int64_t>(1, std::min(count, most) / kRun), step = count / runs;
  int64_t large = 0, seen = 0;
  for (int64_t i = 0; i < runs; ++i) {
    const uint8_t* bytes = product.rhs.plane[0] + i * step;
    const int64_t some = std::min(kRun, step);
    for (int64_t j = 0; j < some; ++j) large += static_cast<uint8_t>(bytes[j] - 64) > 128 ? 1 : 0;
    seen += some;
  }
  return 16 * large <= seen;
}

// A ReLU's output, or codes of which hardly any is large, may have kernels of their own.
const Kernels& Choose(const Kernels& kernels, const std::vector<Product>& products) {
  constexpr int64_t kSeen = 1 << 16;
  if (products[0].geometry.groups != 1 || IsWinograd(products[0], kernels.shape)) return kernels;
  const auto all = [&](auto is) { return std::all_of(products.begin(), products.end(), is); };
  if (!all([](const Product& p) { return p.lhs.bits <= 8; })) return kernels;
  if (kernels.nonnegative != nullptr &&
      all([](const Product& p) { return IsNonnegative(p.lhs.plane[0], SizesOf(p.kind, p.geometry).lhs); }))
    return *kernels.nonnegative;
  const int64_t most = kSeen / static_cast<int64_t>(products.size());
  if (kernels.small != nullptr && all([&](const Product& p) { return AreSmall(p, most); }))
    return *kernels.small;
  return kernels;
}

double MultiplyAdds(const Product& product) {  // of limbs
  const Geometry& g = product.geometry;
  return static_cast<double>(g.batch) * Volume(g.out) * Volume(g.window) *
         (static_cast<double>(g.in_channels) / g.groups) * g.out_channels *
         (LimbCount(product.lhs.bits) * LimbCount(product.rhs.bits));
}

double Elements(const Product& product) {  // codes by limbs
  const Sizes sizes = SizesOf(product.kind, product.geometry);
  return static_cast<double>(sizes.lhs) * LimbCount(product.lhs.bits) +
         static_cast<double>(sizes.rhs) * LimbCount(product.rhs.bits) + static_cast<double>(sizes.out);
}

double SerialMultiplyAdds(const Kernels& kernels, const Product& product) {
  return product.geometry.groups > 1 ? kSerialInGroups : kernels.shape.serial;
}

}  // namespace

bool IsSmall(const Kernels& kernels, const Product& product, int64_t count) {
  const auto products = static_cast<double>(count);
  return MultiplyAdds(product) * products < SerialMultiplyAdds(kernels, product) &&
         Elements(product) * products < kSerialElements;
}

bool RunProducts(const Kernels& isa, const std::vector<Product>& products, Parallel& parallel) {
  if (products.empty() || SizesOf(products[0].kind, products[0].geometry).out == 0) return true;
  const Kernels& kernels = Choose(isa, products);
  // Small products are handed out whole, large ones are split among the threads themselves.
  const bool is_whole =
      products.size() > 1 && MultiplyAdds(products[0]) < SerialMultiplyAdds(kernels, products[0]);
  const std::vector<Plan> plans = MakePlans(kernels, products, is_whole ? 1 : parallel.workers());
  int64_t bytes = 64;
  for (const Plan& plan : plans) bytes = std::max(bytes, plan.scratch_bytes);
  const Scratch scratch(bytes * (is_whole ? parallel.workers() : 1));
  if (scratch.data() == nullptr) return false;
  if (is_whole) {
    const auto count = static_cast<int64_t>(products.size());
    const int64_t per_task = (count + 8 * parallel.workers() - 1) / (8 * parallel.workers());
    Share share{kernels, products, plans, scratch.data(), bytes, per_task};
    parallel.Run((count + per_task - 1) / per_task, RunShare, &share);
  } else {
    for (size_t i = 0; i < products.size(); ++i)
      kernels.run(plans[plans.size() == 1 ? 0 : i], products[i], scratch.data(), parallel);
  }
  return true;
}

}  // namespace jax_apt
