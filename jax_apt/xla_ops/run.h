// Runs products of equal geometry on a team of threads.
#ifndef JAX_APT_XLA_OPS_RUN_H_
#define JAX_APT_XLA_OPS_RUN_H_

#include <vector>

#include "product.h"

namespace jax_apt {

// Whether `count` products take less time than waking a helper for them.
bool IsSmall(const Kernels& kernels, const Product& product, int64_t count);

// Runs every product. False if there is no memory for scratch, in which case nothing was written.
bool RunProducts(const Kernels& kernels, const std::vector<Product>& products, Parallel& parallel);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_RUN_H_
