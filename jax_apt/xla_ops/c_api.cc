// Plain C entry points: the name of the ISA, and a product of raw buffers that tests can put anywhere.
#include "batch.h"
#include "dispatch.h"
#include "team.h"

#define JAX_APT_EXPORT extern "C" __attribute__((visibility("default")))

using jax_apt::DType;

// Name of the ISA that "auto" takes; null if JAX_APT_ISA names one that cannot run here.
JAX_APT_EXPORT const char* jax_apt_isa() {
  const jax_apt::Kernels* kernels = jax_apt::FindKernels("auto");
  return kernels == nullptr ? nullptr : kernels->name;
}

JAX_APT_EXPORT const char* jax_apt_available_isas() { return jax_apt::AvailableIsas(); }

// out (M, N) = lhs * rhs on the calling thread. dtypes: 0 float32, 1 int8, 2 int16, 3 int32; formats as in
// the custom call. Returns null, or what is wrong.
JAX_APT_EXPORT const char* jax_apt_gemm_on_buffers(const char* isa, const void* lhs, int lhs_dtype,
                                                   int lhs_transposed, const void* rhs, int rhs_dtype,
                                                   int rhs_transposed, const int32_t* formats, float* out,
                                                   int64_t m, int64_t n, int64_t k) {
  const jax_apt::Kernels* kernels = jax_apt::FindKernels(isa);
  if (kernels == nullptr) return "this ISA cannot run here";
  const jax_apt::Gemm g{{lhs, static_cast<DType>(lhs_dtype), lhs_transposed != 0, formats[0], formats[1]},
                        {rhs, static_cast<DType>(rhs_dtype), rhs_transposed != 0, formats[2], formats[3]},
                        out,
                        m,
                        n,
                        k};
  int64_t value;
  if (const char* error = jax_apt::FindFormatError(g, &value)) return error;
  jax_apt::Serial serial;
  return jax_apt::RunBatch(*kernels, {g}, serial) ? nullptr : "no memory for scratch";
}
