#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace jax_apt {
namespace {

std::vector<const Kernels*> Detect() {
  std::vector<const Kernels*> found;
#ifdef JAX_APT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&kAvx512VnniKernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kScalarKernels);
  return found;
}

const std::vector<const Kernels*>& Available() {
  static const std::vector<const Kernels*> found = Detect();
  return found;
}

}  // namespace

const Kernels* FindKernels(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    const char* forced = std::getenv("JAX_APT_ISA");
    if (forced == nullptr || *forced == '\0') return Available().front();
    name = forced;
  }
  for (const Kernels* kernels : Available())
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  return nullptr;
}

const char* AvailableIsas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : Available()) joined += (joined.empty() ? "" : ",") + std::string(kernels->name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace jax_apt
