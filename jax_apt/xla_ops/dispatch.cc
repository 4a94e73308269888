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
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
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

// Read once: getenv is no friend of threads that set other variables.
const std::string& ForcedName() {
  static const std::string name = [] {
    const char* value = std::getenv("JAX_APT_ISA");
    return std::string(value == nullptr || std::strcmp(value, "auto") == 0 ? "" : value);
  }();
  return name;
}

}  // namespace

const Kernels* FindKernels(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    if (ForcedName().empty()) return Available().front();
    name = ForcedName().c_str();
  }
  for (const Kernels* kernels : Available())
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  return nullptr;
}

const char* AvailableIsas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : Available())
      joined += (joined.empty() ? "" : ",") + std::string(kernels->name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace jax_apt
