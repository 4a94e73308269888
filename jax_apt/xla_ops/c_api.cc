// Plain C entry points: the names of the ISAs, and the operations on raw buffers that tests can put anywhere.
#include "call.h"
#include "dispatch.h"
#include "run.h"
#include "team.h"

#define JAX_APT_EXPORT extern "C" __attribute__((visibility("default")))

using namespace jax_apt;

// Name of the ISA that "auto" takes; null if JAX_APT_ISA names one that cannot run here.
JAX_APT_EXPORT const char* jax_apt_isa() {
  const Kernels* kernels = FindKernels("auto");
  return kernels == nullptr ? nullptr : kernels->name;
}

JAX_APT_EXPORT const char* jax_apt_available_isas() { return AvailableIsas(); }

// One product on the calling thread: `kind`, `geometry` and `formats` as in the custom call, planes one
// behind the other. Returns null, or what is wrong.
JAX_APT_EXPORT const char* jax_apt_product_on_buffers(const char* isa, int kind, const int64_t* geometry,
                                                      const uint8_t* lhs, const uint8_t* rhs,
                                                      const int32_t* formats, float* out) {
  const Kernels* kernels = FindKernels(isa);
  if (kernels == nullptr) return "this ISA cannot run here";
  Call call;
  if (const char* error = call.Read(kind, geometry, kGeometrySize)) return error;
  std::vector<Product> products(call.matrices);
  for (int64_t i = 0; i < call.matrices; ++i) products[i] = call.At(i, lhs, rhs, formats, out);
  int64_t value;
  if (const char* error = FindError(products[0], &value)) return error;
  Serial serial;
  return RunProducts(*kernels, products, serial) ? nullptr : "no memory for scratch";
}

// float32 -> limb planes one behind the other; returns how many values were not finite, -1 for a wrong ISA.
JAX_APT_EXPORT int64_t jax_apt_quantize_on_buffers(const char* isa, const float* x, int64_t count, int bits,
                                                   int exponent, uint8_t* planes) {
  const Kernels* kernels = FindKernels(isa);
  return kernels == nullptr ? -1 : kernels->quantize(x, count, bits, exponent, planes, count);
}
