#include "run.h"

#include <algorithm>

#include "plan.h"
#include "scratch.h"
#include "team.h"

namespace jax_apt {
namespace {

// Of groups, whose kernels are slower than the full ones.
constexpr double kSerialInGroups = 1e6;

int64_t Volume(const int64_t* size) { return size[0] * size[1] * size[2]; }

bool IsEmpty(const Product& product) {
  const Geometry& g = product.geometry;
  switch (product.kind) {
    case Kind::kForward: return g.batch * Volume(g.out) * g.out_channels == 0;
    case Kind::kInputGradient: return g.batch * Volume(g.in) * g.in_channels == 0;
    case Kind::kFilterGradient: return Volume(g.window) * g.in_channels * g.out_channels == 0;
  }
  return true;
}

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

double MultiplyAdds(const Product& product) {  // of limbs
  const Geometry& g = product.geometry;
  return static_cast<double>(g.batch) * Volume(g.out) * Volume(g.window) *
         (static_cast<double>(g.in_channels) / std::max<int64_t>(g.groups, 1)) * g.out_channels *
         (LimbCount(product.lhs.bits) * LimbCount(product.rhs.bits));
}

}  // namespace

bool IsSmall(const Kernels& kernels, const Product& product, int64_t count) {
  const double serial = product.geometry.groups > 1 ? kSerialInGroups : kernels.shape.serial;
  return MultiplyAdds(product) * static_cast<double>(count) < serial;
}

bool RunProducts(const Kernels& kernels, const std::vector<Product>& products, Parallel& parallel) {
  if (products.empty() || IsEmpty(products[0])) return true;
  // Small products are handed out whole, large ones are split among the threads themselves.
  const bool is_whole = products.size() > 1 && IsSmall(kernels, products[0], 1);
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
