// XLA's view of the kernels: unpacks and validates buffers, and exports the FFI handlers.
#include <atomic>
#include <string>
#include <vector>

#include "call.h"
#include "dispatch.h"
#include "run.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_apt {
namespace {

constexpr int64_t kSerialValues = 1 << 19;  // quantized on the calling thread alone
constexpr int64_t kTaskValues = 1 << 15;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument(message); }

Team MakeTeam(ffi::ThreadPool& pool, bool is_serial) {
  return Team(is_serial ? 1 : static_cast<int>(pool.num_threads()),
              [&pool](std::function<void()> task) { pool.Schedule([task = std::move(task)] { task(); }); });
}

ffi::Error FindIsa(const char* op, std::string_view isa, const Kernels** kernels) {
  *kernels = FindKernels(std::string(isa).c_str());
  if (*kernels != nullptr) return ffi::Error::Success();
  return Invalid(std::string(op) + ": ISA '" + std::string(isa) +
                 "' (or JAX_APT_ISA) cannot run here; available: " + AvailableIsas());
}

// ---- Product

ffi::Error ProductImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> lhs, ffi::Buffer<ffi::U8> rhs,
                       ffi::Buffer<ffi::S32> formats, ffi::ResultBuffer<ffi::F32> out, int64_t kind,
                       ffi::Span<const int64_t> geometry, std::string_view isa) {
  Call call;
  if (const char* error = call.Read(kind, geometry.begin(), static_cast<int64_t>(geometry.size())))
    return Invalid(std::string("product: ") + error);
  const Kernels* kernels;
  if (auto error = FindIsa("product", isa, &kernels); error.failure()) return error;
  const int64_t batch = static_cast<int64_t>(formats.element_count()) / 4;
  const auto lhs_size = static_cast<int64_t>(lhs.element_count());
  const auto rhs_size = static_cast<int64_t>(rhs.element_count());
  if (static_cast<int64_t>(out->element_count()) != batch * call.matrices * call.OutSize())
    return Invalid("product: the result has " + std::to_string(out->element_count()) + " elements, not " +
                   std::to_string(batch * call.matrices * call.OutSize()));
  if (out->element_count() == 0) return ffi::Error::Success();
  std::vector<Product> products;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* f = formats.typed_data() + 4 * b;
    const Product checked{call.kind, call.geometry, {{}, f[0], f[1]}, {{}, f[2], f[3]}, nullptr};
    int64_t value;
    if (const char* error = FindError(checked, &value))
      return Invalid(std::string("product: ") + error + ", got " + std::to_string(value));
    const int64_t lhs_bytes = call.matrices * call.LhsSize(), rhs_bytes = call.matrices * call.RhsSize();
    if (lhs_size < batch * lhs_bytes * LimbCount(f[0]) || rhs_size < batch * rhs_bytes * LimbCount(f[2]))
      return Invalid("product: " + std::to_string(f[0]) + " x " + std::to_string(f[2]) +
                     " bits need more planes than the operands have");
    for (int64_t i = 0; i < call.matrices; ++i)
      products.push_back(call.At(i, lhs.typed_data() + b * (lhs_size / batch),
                                 rhs.typed_data() + b * (rhs_size / batch), f,
                                 out->typed_data() + b * call.matrices * call.OutSize()));
  }
  Team team = MakeTeam(pool, IsSmall(*kernels, products[0], static_cast<int64_t>(products.size())));
  if (RunProducts(*kernels, products, team)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "product: no memory for scratch");
}

// ---- Quantization

struct QuantizeTasks {
  const Kernels& kernels;
  const float* x;
  const int32_t* formats;
  uint8_t* planes;
  int64_t count, limbs;  // of one tensor
  int64_t chunk, chunks;
  std::atomic<int64_t>* nonfinite;

  static void Run(void* context, int64_t task, int) {
    const auto& self = *static_cast<const QuantizeTasks*>(context);
    const int64_t b = task / self.chunks, start = task % self.chunks * self.chunk;
    const int64_t bad = self.kernels.quantize(
        self.x + b * self.count + start, std::min(self.chunk, self.count - start), self.formats[2 * b],
        self.formats[2 * b + 1], self.planes + b * self.limbs * self.count + start, self.count);
    if (bad != 0) self.nonfinite[b].fetch_add(bad, std::memory_order_relaxed);
  }
};

ffi::Error QuantizeImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> formats,
                        ffi::ResultBuffer<ffi::U8> planes, ffi::ResultBuffer<ffi::F32> nonfinite,
                        std::string_view isa) {
  const Kernels* kernels;
  if (auto error = FindIsa("quantize", isa, &kernels); error.failure()) return error;
  const int64_t batch = static_cast<int64_t>(formats.element_count()) / 2;
  const auto size = static_cast<int64_t>(x.element_count());
  if (static_cast<int64_t>(nonfinite->element_count()) != batch || (batch != 0 && size % batch != 0))
    return Invalid("quantize: " + std::to_string(batch) + " formats for " + std::to_string(size) + " values");
  for (int64_t b = 0; b < batch; ++b) nonfinite->typed_data()[b] = 0;
  if (size == 0) return ffi::Error::Success();
  const int64_t limbs = static_cast<int64_t>(planes->element_count()) / size;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t bits = formats.typed_data()[2 * b], exponent = formats.typed_data()[2 * b + 1];
    if (bits < 2 || bits > 8 * std::min<int64_t>(limbs, kMaxLimbs))
      return Invalid("quantize: bits must be in 2.." + std::to_string(8 * limbs) + ", got " +
                     std::to_string(bits));
    if (exponent < -126 || exponent > 126)
      return Invalid("quantize: exponent must be in -126..126, got " + std::to_string(exponent));
  }
  const int64_t count = size / batch, chunk = std::min<int64_t>(count, kTaskValues);
  std::vector<std::atomic<int64_t>> bad(batch);
  QuantizeTasks tasks{*kernels,
                      x.typed_data(),
                      formats.typed_data(),
                      planes->typed_data(),
                      count,
                      limbs,
                      chunk,
                      (count + chunk - 1) / chunk,
                      bad.data()};
  MakeTeam(pool, size <= kSerialValues).Run(batch * tasks.chunks, QuantizeTasks::Run, &tasks);
  for (int64_t b = 0; b < batch; ++b) nonfinite->typed_data()[b] = static_cast<float>(bad[b].load());
  return ffi::Error::Success();
}

// ---- Max pooling's gradient

constexpr int64_t kPoolSize = 5 * kSpace + 1;  // numbers of a `Pool`
constexpr int64_t kPoolValues = 1 << 14;       // of x, that a task should have

int64_t Volume(const int64_t* size) { return size[0] * size[1] * size[2]; }

Pool ReadPool(const int64_t* numbers) {
  Pool pool;
  for (int64_t* field : {pool.in, pool.out, pool.window, pool.stride, pool.pad})
    for (int d = 0; d < kSpace; ++d) field[d] = *numbers++;
  pool.inner = *numbers;
  return pool;
}

struct PoolTasks {
  const Kernels& kernels;
  const Pool& pool;
  const float *x, *dy;
  float* dx;
  int64_t outer;         // with the batch
  int64_t images;        // of a task
  int64_t inner, parts;  // neighbours of a task, and tasks that share an image

  static void Run(void* context, int64_t task, int) {
    const auto& self = *static_cast<const PoolTasks*>(context);
    const Pool& pool = self.pool;
    const int64_t first = task / self.parts * self.images, start = task % self.parts * self.inner;
    for (int64_t n = first; n < std::min(self.outer, first + self.images); ++n) {
      const int64_t x = n * Volume(pool.in) * pool.inner, y = n * Volume(pool.out) * pool.inner;
      self.kernels.max_pool_gradient(pool, self.x + x, self.dy + y, self.dx + x, start,
                                     std::min(self.inner, pool.inner - start));
    }
  }
};

ffi::Error MaxPoolGradientImpl(ffi::ThreadPool pool_of_threads, ffi::Buffer<ffi::F32> x,
                               ffi::Buffer<ffi::F32> dy, ffi::ResultBuffer<ffi::F32> dx,
                               ffi::Span<const int64_t> geometry, std::string_view isa) {
  const Kernels* kernels;
  if (auto error = FindIsa("max_pool_gradient", isa, &kernels); error.failure()) return error;
  if (static_cast<int64_t>(geometry.size()) != kPoolSize)
    return Invalid("max_pool_gradient: the geometry has the wrong length");
  const Pool pool = ReadPool(geometry.begin());
  if (Volume(pool.window) > kMaxPoolTaps || Volume(pool.in) > INT32_MAX)
    return Invalid("max_pool_gradient: the window or the image is too large");
  const auto size = static_cast<int64_t>(x.element_count());
  if (size == 0) return ffi::Error::Success();
  const int64_t image = Volume(pool.in) * pool.inner, outer = size / image;
  if (outer * image != size ||
      outer * Volume(pool.out) * pool.inner != static_cast<int64_t>(dy.element_count()))
    return Invalid("max_pool_gradient: the buffers do not have the sizes of the geometry");
  // Whole images for each thread if there are enough; else they are shared along the inner dimension.
  const int64_t images = std::max<int64_t>(1, kPoolValues / image);
  const bool is_split = outer < 2 * static_cast<int64_t>(pool_of_threads.num_threads());
  const int64_t inner = is_split ? std::min<int64_t>(pool.inner, 64) : pool.inner;
  PoolTasks tasks{*kernels,
                  pool,
                  x.typed_data(),
                  dy.typed_data(),
                  dx->typed_data(),
                  outer,
                  images,
                  inner,
                  (pool.inner + inner - 1) / inner};
  MakeTeam(pool_of_threads, size <= kPoolValues)
      .Run((outer + images - 1) / images * tasks.parts, PoolTasks::Run, &tasks);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_apt

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_product, jax_apt::ProductImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()   // lhs (batch, limbs, ...)
                                  .Arg<ffi::Buffer<ffi::U8>>()   // rhs (batch, limbs, ...)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // formats (batch, 4)
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kind")
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_quantize, jax_apt::QuantizeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x (batch, ...)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // formats (batch, 2)
                                  .Ret<ffi::Buffer<ffi::U8>>()   // planes (batch, limbs, ...)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // values that were not finite (batch)
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_max_pool_gradient, jax_apt::MaxPoolGradientImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x (batch, outer, in, inner)
                                  .Arg<ffi::Buffer<ffi::F32>>()  // dy (batch, outer, out, inner)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // dx, as x
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<std::string_view>("isa"));

#pragma GCC visibility pop
