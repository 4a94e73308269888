// Instruction ceilings: how many operations a second the multiply-add instructions of each instruction set
// sustain in the shape of a GEMM micro-kernel, with operands in the L1 cache and sums in registers.
//
//   ceilings THREADS   prints "NAME GOPS" for each kernel that this CPU can run; an operation is one
//                      multiplication or one addition.
//
// The kernels are inline assembly because compilers spill tiles of this size that are held in arrays.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if !defined(__x86_64__)
int main(void) { return 0; }  // no kernels for this architecture: no ceilings
#else
#include <sys/syscall.h>

enum { kDepth = 64 };        // steps along the depth in one call
enum { kBytes = 64 * 1024 };  // of each operand; every kernel reads less

typedef void (*Kernel)(const void* lhs, const void* rhs, void* out);

// 6 x 16 tile in 256-bit registers: sums in ymm0-11, rhs in 12-13, broadcast lhs in 14, product in 15.
#define ZERO256(r) "vpxor %%ymm" #r ",%%ymm" #r ",%%ymm" #r "\n"
#define ROW_FUSED256(op, r, s, at) \
  "vpbroadcastd " #at "(%0),%%ymm14\n" op " %%ymm12,%%ymm14,%%ymm" #r "\n" op " %%ymm13,%%ymm14,%%ymm" #s "\n"
#define ROW_MADD256(op, r, s, at)                                                          \
  "vpbroadcastd " #at "(%0),%%ymm14\n"                                                     \
  "vpmaddwd %%ymm12,%%ymm14,%%ymm15\n vpaddd %%ymm15,%%ymm" #r ",%%ymm" #r "\n"           \
  "vpmaddwd %%ymm13,%%ymm14,%%ymm15\n vpaddd %%ymm15,%%ymm" #s ",%%ymm" #s "\n"
#define STEP256(ROW, op)                                                                   \
  "vmovdqu (%1),%%ymm12\n vmovdqu 32(%1),%%ymm13\n"                                        \
  ROW(op, 0, 1, 0) ROW(op, 2, 3, 4) ROW(op, 4, 5, 8) ROW(op, 6, 7, 12) ROW(op, 8, 9, 16)   \
  ROW(op, 10, 11, 20) "add $24,%0\n add $64,%1\n"
#define KERNEL256(name, ROW, op)                                                           \
  static void name(const void* lhs, const void* rhs, void* out) {                          \
    long n = kDepth / 4;                                                                   \
    __asm__ volatile(                                                                      \
        ZERO256(0) ZERO256(1) ZERO256(2) ZERO256(3) ZERO256(4) ZERO256(5) ZERO256(6)       \
        ZERO256(7) ZERO256(8) ZERO256(9) ZERO256(10) ZERO256(11)                           \
        "1:\n" STEP256(ROW, op) STEP256(ROW, op) STEP256(ROW, op) STEP256(ROW, op)         \
        "dec %2\n jnz 1b\n vmovdqu %%ymm0,(%3)\n vmovdqu %%ymm11,32(%3)\n vzeroupper\n"    \
        : "+r"(lhs), "+r"(rhs), "+r"(n)                                                    \
        : "r"(out)                                                                         \
        : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",        \
          "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");           \
  }

KERNEL256(Avx2Fma, ROW_FUSED256, "vfmadd231ps")
KERNEL256(Avx2Madd, ROW_MADD256, "vpmaddwd")
KERNEL256(AvxVnniBusd, ROW_FUSED256, "%{vex%} vpdpbusd")

// u8 x s8 on AVX2 as three instructions: sums in ymm0-9 (a 5 x 16 tile), ones in 11.
#define ROW_MADDUBS(op, r, s, at)                                                          \
  "vpbroadcastd " #at "(%0),%%ymm14\n"                                                     \
  "vpmaddubsw %%ymm12,%%ymm14,%%ymm15\n vpmaddwd %%ymm11,%%ymm15,%%ymm15\n"                \
  "vpaddd %%ymm15,%%ymm" #r ",%%ymm" #r "\n"                                               \
  "vpmaddubsw %%ymm13,%%ymm14,%%ymm10\n vpmaddwd %%ymm11,%%ymm10,%%ymm10\n"                \
  "vpaddd %%ymm10,%%ymm" #s ",%%ymm" #s "\n"
#define STEP_MADDUBS                                                                       \
  "vmovdqu (%1),%%ymm12\n vmovdqu 32(%1),%%ymm13\n"                                        \
  ROW_MADDUBS(, 0, 1, 0) ROW_MADDUBS(, 2, 3, 4) ROW_MADDUBS(, 4, 5, 8)                     \
  ROW_MADDUBS(, 6, 7, 12) ROW_MADDUBS(, 8, 9, 16) "add $20,%0\n add $64,%1\n"
static void Avx2Maddubs(const void* lhs, const void* rhs, void* out) {
  long n = kDepth / 4;
  __asm__ volatile(
      ZERO256(0) ZERO256(1) ZERO256(2) ZERO256(3) ZERO256(4) ZERO256(5) ZERO256(6) ZERO256(7)
      ZERO256(8) ZERO256(9)
      "vpcmpeqw %%ymm11,%%ymm11,%%ymm11\n vpsrlw $15,%%ymm11,%%ymm11\n"
      "1:\n" STEP_MADDUBS STEP_MADDUBS STEP_MADDUBS STEP_MADDUBS
      "dec %2\n jnz 1b\n vmovdqu %%ymm0,(%3)\n vmovdqu %%ymm9,32(%3)\n vzeroupper\n"
      : "+r"(lhs), "+r"(rhs), "+r"(n)
      : "r"(out)
      : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

// 14 x 32 tile in 512-bit registers: sums in zmm0-27, rhs in 28-29, broadcast lhs in 30. Built for plain
// x86-64, where the compiler knows of xmm0-15 alone: only these can and need be named as clobbered.
#define ZERO512(r) "vpxord %%zmm" #r ",%%zmm" #r ",%%zmm" #r "\n"
#define ROW512(op, r, s, at) \
  "vpbroadcastd " #at "(%0),%%zmm30\n" op " %%zmm28,%%zmm30,%%zmm" #r "\n" op " %%zmm29,%%zmm30,%%zmm" #s "\n"
#define STEP512(op)                                                                        \
  "vmovdqu64 (%1),%%zmm28\n vmovdqu64 64(%1),%%zmm29\n"                                    \
  ROW512(op, 0, 1, 0) ROW512(op, 2, 3, 4) ROW512(op, 4, 5, 8) ROW512(op, 6, 7, 12)         \
  ROW512(op, 8, 9, 16) ROW512(op, 10, 11, 20) ROW512(op, 12, 13, 24) ROW512(op, 14, 15, 28) \
  ROW512(op, 16, 17, 32) ROW512(op, 18, 19, 36) ROW512(op, 20, 21, 40) ROW512(op, 22, 23, 44) \
  ROW512(op, 24, 25, 48) ROW512(op, 26, 27, 52) "add $56,%0\n add $128,%1\n"
#define KERNEL512(name, op)                                                                \
  static void name(const void* lhs, const void* rhs, void* out) {                          \
    long n = kDepth / 4;                                                                   \
    __asm__ volatile(                                                                      \
        ZERO512(0) ZERO512(1) ZERO512(2) ZERO512(3) ZERO512(4) ZERO512(5) ZERO512(6)       \
        ZERO512(7) ZERO512(8) ZERO512(9) ZERO512(10) ZERO512(11) ZERO512(12) ZERO512(13)   \
        ZERO512(14) ZERO512(15) ZERO512(16) ZERO512(17) ZERO512(18) ZERO512(19)            \
        ZERO512(20) ZERO512(21) ZERO512(22) ZERO512(23) ZERO512(24) ZERO512(25)            \
        ZERO512(26) ZERO512(27)                                                            \
        "1:\n" STEP512(op) STEP512(op) STEP512(op) STEP512(op)                             \
        "dec %2\n jnz 1b\n vmovdqu64 %%zmm0,(%3)\n vmovdqu64 %%zmm27,64(%3)\n vzeroupper\n" \
        : "+r"(lhs), "+r"(rhs), "+r"(n)                                                    \
        : "r"(out)                                                                         \
        : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",        \
          "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");           \
  }

KERNEL512(Avx512Fma, "vfmadd231ps")
KERNEL512(Avx512Busd, "vpdpbusd")
KERNEL512(Avx512Wssd, "vpdpwssd")

// 32 x 32 tile in four accumulating tiles, two tiles of each operand; 64 bytes of depth a step.
static void AmxBusd(const void* lhs, const void* rhs, void* out) {
  const char* a = lhs;
  const char* b = rhs;
  long n = 8, stride = 64;
  __asm__ volatile(
      "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"
      "1:\n"
      "tileloadd (%0,%3,1),%%tmm4\n tileloadd (%1,%3,1),%%tmm6\n tdpbusd %%tmm6,%%tmm4,%%tmm0\n"
      "tileloadd 1024(%1,%3,1),%%tmm7\n tdpbusd %%tmm7,%%tmm4,%%tmm1\n"
      "tileloadd 1024(%0,%3,1),%%tmm5\n tdpbusd %%tmm6,%%tmm5,%%tmm2\n tdpbusd %%tmm7,%%tmm5,%%tmm3\n"
      "add $2048,%0\n add $2048,%1\n dec %2\n jnz 1b\n tilestored %%tmm0,(%4,%3,1)\n"
      : "+r"(a), "+r"(b), "+r"(n)
      : "r"(stride), "r"(out)
      : "memory");
}

struct __attribute__((packed)) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

static void ConfigureTiles(void) {
  struct TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.column_bytes[i] = 64, config.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

static int HasCpuFlag(const char* flag) {
  static char line[1 << 14];
  FILE* file = fopen("/proc/cpuinfo", "r");
  int found = 0;
  char spaced[64];
  snprintf(spaced, sizeof spaced, " %s ", flag);
  while (file && !found && fgets(line, sizeof line, file)) {
    if (strncmp(line, "flags", 5)) continue;
    line[strcspn(line, "\n")] = ' ';
    found = strstr(line, spaced) != NULL;
    break;
  }
  if (file) fclose(file);
  return found;
}

static int MayUseTiles(void) {  // the kernel grants tile data (18) to a process that asks
  return HasCpuFlag("amx_int8") && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
}

struct Entry {
  const char* name;
  const char* flag;
  Kernel kernel;
  double ops;  // multiplications and additions of one call
};

static const struct Entry kEntries[] = {
    {"avx2 f32 vfmadd231ps", "fma", Avx2Fma, 2.0 * 6 * 16 * 1 * kDepth},
    {"avx2 s16 vpmaddwd", "avx2", Avx2Madd, 2.0 * 6 * 16 * 2 * kDepth},
    {"avx2 u8s8 vpmaddubsw", "avx2", Avx2Maddubs, 2.0 * 5 * 16 * 4 * kDepth},
    {"avxvnni u8s8 vpdpbusd", "avx_vnni", AvxVnniBusd, 2.0 * 6 * 16 * 4 * kDepth},
    {"avx512 f32 vfmadd231ps", "avx512f", Avx512Fma, 2.0 * 14 * 32 * 1 * kDepth},
    {"avx512vnni u8s8 vpdpbusd", "avx512_vnni", Avx512Busd, 2.0 * 14 * 32 * 4 * kDepth},
    {"avx512vnni s16 vpdpwssd", "avx512_vnni", Avx512Wssd, 2.0 * 14 * 32 * 2 * kDepth},
    {"amx u8s8 tdpbusd", "amx_int8", AmxBusd, 2.0 * 32 * 32 * 64 * 8},
};

struct Task {
  const struct Entry* entry;
  long calls;
};

static void* Work(void* argument) {
  const struct Task* task = argument;
  char *lhs = aligned_alloc(64, kBytes), *rhs = aligned_alloc(64, kBytes), *out = aligned_alloc(64, 4096);
  memset(lhs, 0x3f, kBytes), memset(rhs, 0x3f, kBytes);  // 0.75 as float32, 63 as int8
  if (task->entry->kernel == AmxBusd) ConfigureTiles();
  for (long i = 0; i < task->calls; i++) task->entry->kernel(lhs, rhs, out);
  if (task->entry->kernel == AmxBusd) __asm__ volatile("tilerelease");
  free(lhs), free(rhs), free(out);
  return NULL;
}

static double Seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double RunThreads(const struct Entry* entry, long calls, int threads) {
  pthread_t ids[256];
  struct Task task = {entry, calls};
  double start = Seconds();
  for (int i = 0; i < threads; i++) pthread_create(&ids[i], NULL, Work, &task);
  for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
  return Seconds() - start;
}

int main(int argc, char** argv) {
  int threads = argc > 1 ? atoi(argv[1]) : 1;
  if (threads < 1 || threads > 256) return fprintf(stderr, "THREADS must be in 1..256\n"), 2;
  int tiles = MayUseTiles();
  for (size_t i = 0; i < sizeof kEntries / sizeof *kEntries; i++) {
    const struct Entry* entry = &kEntries[i];
    if (!HasCpuFlag(entry->flag) || (entry->kernel == AmxBusd && !tiles)) continue;
    long calls = 4000;
    while (RunThreads(entry, calls, threads) < 0.02) calls *= 2;
    double best = 1e30;
    for (int round = 0; round < 5; round++) {
      double seconds = RunThreads(entry, calls, threads);
      if (seconds < best) best = seconds;
    }
    printf("%s %.1f\n", entry->name, entry->ops * calls * threads / best / 1e9);
  }
  return 0;
}
#endif
