#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#if defined(JAX_APT_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(JAX_APT_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(JAX_APT_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace jax_apt {
namespace {

#ifdef JAX_APT_X86
// The kernel saves the tile registers only of processes that asked for them.
bool IsAmxPermitted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool HasCpuidBit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {};
  __asm__("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(subleaf));
  return (r[reg] >> bit & 1) != 0;
}
#endif

#ifdef JAX_APT_ARM64
#ifdef __APPLE__
bool HasArmFeature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool HasDotProduct() { return HasArmFeature("hw.optional.arm.FEAT_DotProd"); }
bool HasI8mm() { return HasArmFeature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
bool HasDotProduct() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }  // HWCAP_ASIMDDP
bool HasI8mm() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }       // HWCAP2_I8MM
#else
bool HasDotProduct() { return false; }
bool HasI8mm() { return false; }
#endif
#endif

std::vector<const Kernels*> Detect() {
  std::vector<const Kernels*> found;
#ifdef JAX_APT_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
  const bool has_leaf7 = [] {
    unsigned a = 0, b, c, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
    return a >= 7;
  }();
  // Leaf 7: edx bits 24 and 25 are AMX tiles and AMX-INT8; subleaf 1, eax bit 4 is AVX-VNNI.
  const bool has_amx = has_vnni && has_leaf7 && HasCpuidBit(7, 0, 3, 24) && HasCpuidBit(7, 0, 3, 25);
  if (has_amx && IsAmxPermitted()) found.push_back(&kAmxKernels);
  if (has_vnni) found.push_back(&kAvx512VnniKernels);
  if (has_avx2 && has_leaf7 && HasCpuidBit(7, 1, 0, 4)) found.push_back(&kAvxVnniKernels);
  if (has_avx2) found.push_back(&kAvx2Kernels);
#endif
#ifdef JAX_APT_ARM64
  // Tested under emulation, bit for bit, but not timed: "auto" takes them, since with the same results the
  // dot product does at once what the plain loops do in many steps.
  if (HasDotProduct() && HasI8mm()) found.push_back(&kNeonI8mmKernels);
  if (HasDotProduct()) found.push_back(&kNeonKernels);
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
