// Fixed-point GEMM: types shared by the XLA binding, the dispatcher and the ISA units.
//
// Types and constants only: a function body here would be compiled once per ISA unit with that unit's
// instructions, and the linker would keep any one of them for all.
#ifndef JAX_APT_XLA_OPS_GEMM_H_
#define JAX_APT_XLA_OPS_GEMM_H_

#include <cstddef>
#include <cstdint>

namespace jax_apt {

enum class DType { kF32, kS8, kS16, kS32 };

// One operand of a matrix product. Integer codes, or float32 that is quantized while it is packed:
//   code = clip(round_half_even(x * 2^-exponent), +-(2^(bits-1) - 1))
// The least integer of the dtype, or a NaN or infinity, marks a non-finite value.
struct Operand {
  const void* data;
  DType dtype;
  bool is_transposed;  // lhs stored (K, M), rhs stored (N, K)
  int bits;            // 2..24; no code needs more
  int exponent;        // -126..126; value = code * 2^exponent
};

// out (M, N) = lhs (M, K) * rhs (K, N): the exact integer sum, rounded once to float32, times
// 2^(lhs.exponent + rhs.exponent). A non-finite value makes its row or column of the result NaN.
struct Gemm {
  Operand lhs, rhs;
  float* out;  // (M, N)
  int64_t m, n, k;
};

// Runs tasks on any number of threads; returns when all are done.
class Parallel {
 public:
  using Task = void (*)(void* context, int64_t task, int worker);
  virtual int workers() const = 0;  // at least 1
  virtual void Run(int64_t tasks, Task task, void* context) = 0;

 protected:
  ~Parallel() = default;
};

// What an ISA unit offers.
struct Kernels {
  const char* name;
  size_t (*scratch_bytes)(const Gemm&, int workers);
  void (*run)(const Gemm&, void* scratch, Parallel&);  // scratch is 64-byte aligned
};

extern const Kernels kScalarKernels;
#ifdef JAX_APT_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_GEMM_H_
