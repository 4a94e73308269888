// Runs products of equal geometry on a team of threads.
#ifndef JAX_APT_XLA_OPS_RUN_H_
#define JAX_APT_XLA_OPS_RUN_H_

#include <vector>

#include "product.h"

namespace jax_apt {

// Multiply-adds below which a helper costs more than it brings.
constexpr double kSerialMultiplyAdds = 1e6;

double MultiplyAdds(const Product& product);

// Runs every product. False if there is no memory for scratch, in which case nothing was written.
bool RunProducts(const Kernels& kernels, const std::vector<Product>& products, Parallel& parallel);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_RUN_H_
