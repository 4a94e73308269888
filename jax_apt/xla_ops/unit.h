// All that an ISA unit compiles with its own instructions, and what it offers.
//
// Included by each of them inside its own anonymous namespace (hence no include guard, no system headers and
// no std:: templates).

#include "product_loops.h"

template <class K>  // of units that include winograd_loops.h
void RunWinograd(const Plan& plan, const Product& product, uint8_t* scratch, Parallel& parallel);

#include "depthwise_loops.h"
#include "measure_loops.h"
#include "pool_loops.h"

template <class K>
void RunProduct(const Plan& plan, const Product& product, uint8_t* scratch, Parallel& parallel) {
  if constexpr (K::kHasWinograd) {
    if (plan.is_winograd) return RunWinograd<K>(plan, product, scratch, parallel);
  }
  if (plan.is_depthwise) return RunDepthwise(plan, product, scratch, parallel);
  Driver<K>(plan, product, scratch).Run(parallel);
}

// What the unit offers.
template <class K>
constexpr Kernels KernelsOf(const char* name, const Kernels* nonnegative = nullptr,
                            const Kernels* small = nullptr) {
  constexpr KernelShape kShape = {
      K::kMr, K::kNr,     K::kRowUnit,     K::kDepthUnit,     sizeof(typename K::Lhs),
      K::kKc, K::kSerial, K::kHasWinograd, K::kIsNonnegative, K::kSaturates};
  return {name,         kShape,       RunProduct<K>,   Quantize,    QuantizeAtRandom,
          MeasureRange, MeasureError, MaxPoolGradient, nonnegative, small};
}
