// Which ISA unit runs: the widest that the CPU has, or the one that is asked for by name.
#ifndef JAX_APT_XLA_OPS_DISPATCH_H_
#define JAX_APT_XLA_OPS_DISPATCH_H_

#include "product.h"

namespace jax_apt {

// Kernels by name ("auto": JAX_APT_ISA if it is set, else the widest); null if they cannot run here.
const Kernels* FindKernels(const char* name);

// Names that can run here, widest first, separated by commas.
const char* AvailableIsas();

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_DISPATCH_H_
