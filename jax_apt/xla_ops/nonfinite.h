// NaN and infinite values in products of codes.
#ifndef JAX_APT_XLA_OPS_NONFINITE_H_
#define JAX_APT_XLA_OPS_NONFINITE_H_

#include "product.h"

namespace jax_apt {

// Sets every result to NaN to which a marked value contributes. Slow: for products that have some.
void SpreadNonfinite(const Product& product);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_NONFINITE_H_
