// A batch of products of equal shape on a team of threads.
#ifndef JAX_APT_XLA_OPS_BATCH_H_
#define JAX_APT_XLA_OPS_BATCH_H_

#include <vector>

#include "gemm.h"

namespace jax_apt {

// What is wrong with the format of a product, or null: bits in 2..24, exponents in -126..126, and a sum that
// fits in 64 bits. `value` receives the offending value.
const char* FindFormatError(const Gemm& g, int64_t* value);

// Multiply-adds below which a helper costs more than it brings.
constexpr int64_t kSerialMultiplyAdds = 1000000;

// Runs every product; scratch is allocated once. False if there is no memory for it, in which case nothing
// ran.
bool RunBatch(const Kernels& kernels, const std::vector<Gemm>& gemms, Parallel& parallel);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_BATCH_H_
