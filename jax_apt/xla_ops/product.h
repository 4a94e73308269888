// Fixed-point products: types shared by the XLA binding, the planner, the dispatcher and the ISA units.
//
// Types and constants only: a function body here would be compiled once per ISA unit with that unit's
// instructions, and the linker would keep any one of them for all.
#ifndef JAX_APT_XLA_OPS_PRODUCT_H_
#define JAX_APT_XLA_OPS_PRODUCT_H_

#include <cstddef>
#include <cstdint>

namespace jax_apt {

constexpr int kMaxLimbs = 3;

struct Draw {  // of random numbers: a layer's in a training step
  uint32_t seed;
  int32_t step;
};

// A float32 tensor that a product quantizes where it lays it out, so that no planes of it are kept: dy of a
// matrix product's filter gradient.
struct Floats {
  const float* values;
  int64_t first;  // of the tensor that is drawn for
  bool is_random;
  Draw draw;
  int64_t* nonfinite;  // grows by how many values are not finite
};

// A quantized tensor in limb planes: plane i holds byte i of (code + 2^(8 * limbs - 1)), little end first,
// where limbs = ceil(bits / 8). All-zero bytes, which no code of the symmetric range gives, mark a value
// that was NaN or infinite.
struct Operand {
  const uint8_t* plane[kMaxLimbs];
  int bits;              // 2..24
  int exponent;          // -126..126; value = code * 2^exponent
  const Floats* floats;  // what takes the place of the planes, or null
};

static constexpr int LimbCount(int bits) { return (bits + 7) / 8; }

// The three products of a convolution y = x * w. A matrix product is a 1x1 convolution of one row of pixels.
enum class Kind {
  kForward,         // (x, w) -> y
  kInputGradient,   // (dy, w) -> dx
  kFilterGradient,  // (x, dy) -> dw
};

constexpr int kSpace = 3;  // spatial dimensions; those that a product lacks have size 1

// x (batch, *in, in_channels), w (*window, in_channels / groups, out_channels), y (batch, *out,
// out_channels):
//   y[n, o] = sum over taps t of x[n, o * stride + t * dilation - pad] . w[t]
struct Geometry {
  int64_t batch;
  int64_t in[kSpace], out[kSpace], window[kSpace];
  int64_t stride[kSpace], pad[kSpace], dilation[kSpace];
  int64_t groups, in_channels, out_channels;
};

// One product: out = exact integer sum, rounded once to float32, times 2^(lhs.exponent + rhs.exponent).
struct Product {
  Kind kind;
  Geometry geometry;
  Operand lhs, rhs;
  float* out;
};

// Runs tasks on any number of threads; returns when all are done.
class Parallel {
 public:
  using Task = void (*)(void* context, int64_t task, int worker);
  struct Stage {
    int64_t tasks;
    Task task;
  };
  virtual int workers() const = 0;  // at least 1
  virtual void Run(int64_t tasks, Task task, void* context) = 0;
  // The tasks of `then` begin when all of `first` are done. Threads meet once, not twice.
  virtual void Run(Stage first, Stage then, void* context) = 0;

 protected:
  ~Parallel() = default;
};

// What the planner must know of a micro-kernel.
struct KernelShape {
  int64_t mr, nr;         // rows and columns of its register block
  int64_t row_unit;       // rows that it reads at once
  int64_t depth_unit;     // depth of a segment is filled up to a multiple of it
  int64_t element_bytes;  // of packed operands: 1 (bytes) or 2 (int16)
  int64_t kc;             // depth of a cache block, where the depth is not that of a filter
  double serial;          // multiply-adds that take one thread as long as it takes to wake another
  bool has_winograd;      // 16-bit elements whose int32 sums wrap
  bool is_nonnegative;    // bytes of lhs are codes of one limb, none negative; else codes + 128
  bool saturates;         // adds two products of bytes in 16 bits: a panel lists where that may saturate
};

struct Plan;

// float32 -> limb planes of `stride` bytes each; returns how many values were not finite.
using QuantizeFn = int64_t (*)(const float* x, int64_t count, int bits, int exponent, uint8_t* planes,
                               int64_t stride);

// The same, rounded at random; the values begin at `first` of the tensor.
using QuantizeAtRandomFn = int64_t (*)(const float* x, int64_t count, int64_t first, Draw, int bits,
                                       int exponent, uint8_t* planes, int64_t stride);

// Largest magnitude of the values, as the bits of a float, and their sum|x|.
using MeasureRangeFn = void (*)(const float* x, int64_t count, int32_t* largest, double* abs_sum);

// sum(|x| - |x^|), or sum|x - x^|, of the values quantized.
using MeasureErrorFn = double (*)(const float* x, int64_t count, int bits, int exponent, bool is_elementwise);

constexpr int kMaxPoolTaps = 1024;  // of a window

// Max pooling: x (..., *in, inner), y (..., *out, inner):
//   y[p, i] = max over taps t of x[p * stride + t - pad, i]
struct Pool {
  int64_t in[kSpace], out[kSpace], window[kSpace], stride[kSpace], pad[kSpace], inner;
};

// Its gradient for one image, `inner` neighbours from `start` on.
using MaxPoolGradientFn = void (*)(const Pool&, const float* x, const float* dy, float* dx, int64_t start,
                                   int64_t inner);

// What an ISA unit offers.
struct Kernels {
  const char* name;
  KernelShape shape;
  void (*run)(const Plan&, const Product&, uint8_t* scratch, Parallel&);
  QuantizeFn quantize;
  QuantizeAtRandomFn quantize_at_random;
  MeasureRangeFn measure_range;
  MeasureErrorFn measure_error;
  MaxPoolGradientFn max_pool_gradient;
  const Kernels* nonnegative;  // quicker for lhs without negative codes, or null
  const Kernels* small;        // quicker for bytes where hardly any of rhs is large, or null
};

extern const Kernels kScalarKernels;
#ifdef JAX_APT_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAmxKernels;
#endif
#ifdef JAX_APT_ARM64
extern const Kernels kNeonKernels;
extern const Kernels kNeonI8mmKernels;
#endif

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_PRODUCT_H_
