// XLA's view of the kernels: unpacks and validates buffers, and exports the FFI handlers.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "call.h"
#include "dispatch.h"
#include "nonfinite.h"
#include "quantize.h"
#include "run.h"
#include "sizes.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_apt {
namespace {

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

// One operand of a batch of products.
struct Planes {
  ffi::Buffer<ffi::U8> planes;
  ffi::Buffer<ffi::S32> bits, exponent;
  ffi::Buffer<ffi::F32> nonfinite;

  const uint8_t* At(int64_t b, int64_t batch) const {
    return planes.typed_data() + b * (static_cast<int64_t>(planes.element_count()) / batch);
  }
  bool HoldsPlanes(int64_t b, int64_t batch, int64_t bytes) const {
    return static_cast<int64_t>(planes.element_count()) >= batch * bytes * LimbCount(bits.typed_data()[b]);
  }
};

ffi::Error Check(const Product& product) {
  int64_t value;
  const char* error = FindError(product, &value);
  if (error == nullptr) return ffi::Error::Success();
  return Invalid(std::string("product: ") + error + ", got " + std::to_string(value));
}

ffi::Error RunAll(const Kernels& kernels, const std::vector<Product>& products, ffi::ThreadPool& pool) {
  Team team = MakeTeam(pool, IsSmall(kernels, products[0], static_cast<int64_t>(products.size())));
  if (RunProducts(kernels, products, team)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "product: no memory for scratch");
}

ffi::Error ReadCall(int64_t kind, ffi::Span<const int64_t> geometry, int64_t batch, int64_t results,
                    Call* call) {
  if (const char* error = call->Read(kind, geometry.begin(), static_cast<int64_t>(geometry.size())))
    return Invalid(std::string("product: ") + error);
  const int64_t wanted = batch * call->matrices * call->sizes().out;
  if (results == wanted) return ffi::Error::Success();
  return Invalid("product: the result has " + std::to_string(results) + " elements, not " +
                 std::to_string(wanted));
}

ffi::Error TooFewPlanes(int lhs_bits, int rhs_bits) {
  return Invalid("product: " + std::to_string(lhs_bits) + " x " + std::to_string(rhs_bits) +
                 " bits need more planes than the operands have");
}

ffi::Error ProductImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> lhs_planes, ffi::Buffer<ffi::S32> lhs_bits,
                       ffi::Buffer<ffi::S32> lhs_exponent, ffi::Buffer<ffi::F32> lhs_nonfinite,
                       ffi::Buffer<ffi::U8> rhs_planes, ffi::Buffer<ffi::S32> rhs_bits,
                       ffi::Buffer<ffi::S32> rhs_exponent, ffi::Buffer<ffi::F32> rhs_nonfinite,
                       ffi::ResultBuffer<ffi::F32> out, int64_t kind, ffi::Span<const int64_t> geometry,
                       std::string_view isa) {
  const Planes lhs{lhs_planes, lhs_bits, lhs_exponent, lhs_nonfinite},
      rhs{rhs_planes, rhs_bits, rhs_exponent, rhs_nonfinite};
  const auto batch = static_cast<int64_t>(lhs_bits.element_count());
  Call call;
  if (auto error = ReadCall(kind, geometry, batch, static_cast<int64_t>(out->element_count()), &call);
      error.failure())
    return error;
  const Kernels* kernels;
  if (auto error = FindIsa("product", isa, &kernels); error.failure()) return error;
  if (out->element_count() == 0) return ffi::Error::Success();
  std::vector<Product> products;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t f[] = {lhs_bits.typed_data()[b], lhs_exponent.typed_data()[b], rhs_bits.typed_data()[b],
                         rhs_exponent.typed_data()[b]};
    for (int64_t i = 0; i < call.matrices; ++i)
      products.push_back(call.At(i, lhs.At(b, batch), rhs.At(b, batch), f,
                                 out->typed_data() + b * call.matrices * call.sizes().out));
    if (auto error = Check(products.back()); error.failure()) return error;
    if (!lhs.HoldsPlanes(b, batch, call.matrices * call.sizes().lhs) ||
        !rhs.HoldsPlanes(b, batch, call.matrices * call.sizes().rhs))
      return TooFewPlanes(f[0], f[2]);
  }
  if (auto error = RunAll(*kernels, products, pool); error.failure()) return error;
  for (int64_t b = 0; b < batch; ++b)
    if (lhs_nonfinite.typed_data()[b] != 0 || rhs_nonfinite.typed_data()[b] != 0)
      for (int64_t i = 0; i < call.matrices; ++i) SpreadNonfinite(products[b * call.matrices + i]);
  return ffi::Error::Success();
}

constexpr int64_t kFormatFields = 4;  // bits, exponent, whether to measure, training step

// `SpreadNonfinite` of a product whose rhs, `count` values, has no planes.
void SpreadFromFloats(const Kernels& kernels, Product product, int64_t count) {
  Operand& rhs = product.rhs;
  std::vector<uint8_t> planes(kMaxLimbs * count);
  kernels.quantize(rhs.floats->values, count, rhs.bits, rhs.exponent, planes.data(), count);
  for (int limb = 0; limb < kMaxLimbs; ++limb) rhs.plane[limb] = planes.data() + limb * count;
  SpreadNonfinite(product);
}

ffi::Error WeightGradientImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> x_planes,
                              ffi::Buffer<ffi::S32> x_bits, ffi::Buffer<ffi::S32> x_exponent,
                              ffi::Buffer<ffi::F32> x_nonfinite, ffi::Buffer<ffi::F32> dy,
                              ffi::Buffer<ffi::S32> formats, ffi::ResultBuffer<ffi::F32> out,
                              ffi::Span<const int64_t> geometry, int64_t seed, std::string_view isa) {
  const Planes x{x_planes, x_bits, x_exponent, x_nonfinite};
  const auto batch = static_cast<int64_t>(x_bits.element_count());
  Call call;
  if (auto error = ReadCall(static_cast<int64_t>(Kind::kFilterGradient), geometry, batch,
                            static_cast<int64_t>(out->element_count()), &call);
      error.failure())
    return error;
  const Kernels* kernels;
  if (auto error = FindIsa("weight_gradient", isa, &kernels); error.failure()) return error;
  if (out->element_count() == 0) return ffi::Error::Success();
  const Sizes sizes = call.sizes();
  const int64_t values = call.matrices * sizes.rhs;
  if (static_cast<int64_t>(dy.element_count()) != batch * values ||
      static_cast<int64_t>(formats.element_count()) != batch * kFormatFields)
    return Invalid("weight_gradient: the buffers do not fit together");
  std::vector<int64_t> nonfinite(batch, 0);
  std::vector<Floats> floats(batch * call.matrices);
  std::vector<Product> products;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* dy_format = formats.typed_data() + b * kFormatFields;
    const int32_t f[] = {x_bits.typed_data()[b], x_exponent.typed_data()[b], dy_format[0], dy_format[1]};
    for (int64_t i = 0; i < call.matrices; ++i) {
      const int64_t first = i * sizes.rhs;
      Floats& of = floats[products.size()];
      of = {dy.typed_data() + b * values + first, first, seed >= 0,
            Draw{static_cast<uint32_t>(seed), dy_format[3]}, &nonfinite[b]};
      products.push_back(
          call.At(i, x.At(b, batch), &of, f, out->typed_data() + b * call.matrices * sizes.out));
    }
    if (auto error = Check(products.back()); error.failure()) return error;
    if (!x.HoldsPlanes(b, batch, call.matrices * sizes.lhs)) return TooFewPlanes(f[0], f[2]);
  }
  if (auto error = RunAll(*kernels, products, pool); error.failure()) return error;
  for (size_t i = 0; i < products.size(); ++i) {
    const auto b = static_cast<int64_t>(i) / call.matrices;
    if (x_nonfinite.typed_data()[b] != 0 || nonfinite[b] != 0)
      SpreadFromFloats(*kernels, products[i], sizes.rhs);
  }
  return ffi::Error::Success();
}

// ---- Quantization

ffi::Error CheckFormat(Format format, int64_t limbs) {
  if (format.bits < 2 || format.bits > 8 * std::min<int64_t>(limbs, kMaxLimbs))
    return Invalid("quantize: bits must be in 2.." + std::to_string(8 * limbs) + ", got " +
                   std::to_string(format.bits));
  if (format.exponent < -126 || format.exponent > 126)
    return Invalid("quantize: exponent must be in -126..126, got " + std::to_string(format.exponent));
  return ffi::Error::Success();
}

ffi::Error QuantizeImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> bits,
                        ffi::Buffer<ffi::S32> exponents, ffi::ResultBuffer<ffi::U8> planes,
                        ffi::ResultBuffer<ffi::F32> nonfinite, std::string_view isa) {
  const Kernels* kernels;
  if (auto error = FindIsa("quantize", isa, &kernels); error.failure()) return error;
  const auto batch = static_cast<int64_t>(bits.element_count()),
             size = static_cast<int64_t>(x.element_count());
  if (static_cast<int64_t>(nonfinite->element_count()) != batch || (batch != 0 && size % batch != 0))
    return Invalid("quantize: " + std::to_string(batch) + " formats for " + std::to_string(size) + " values");
  for (int64_t b = 0; b < batch; ++b) nonfinite->typed_data()[b] = 0;
  if (size == 0) return ffi::Error::Success();
  const int64_t limbs = static_cast<int64_t>(planes->element_count()) / size, count = size / batch;
  Team team = MakeTeam(pool, size <= kSerialValues);
  for (int64_t b = 0; b < batch; ++b) {
    const Format format{bits.typed_data()[b], exponents.typed_data()[b]};
    if (auto error = CheckFormat(format, limbs); error.failure()) return error;
    nonfinite->typed_data()[b] =
        static_cast<float>(QuantizeTensor(*kernels, x.typed_data() + b * count, count, format, nullptr,
                                          planes->typed_data() + b * limbs * count, count, team));
  }
  return ffi::Error::Success();
}

ffi::Error ReadChoice(ffi::Span<const int64_t> widths, int64_t measure, int64_t is_restart, float limit,
                      Choice* choice) {
  if (widths.size() == 0 || widths.size() > kMaxWidths || measure < 0 || measure > 2)
    return Invalid("adapt: the candidate widths or the measure are wrong");
  *choice = {{}, static_cast<int>(widths.size()), static_cast<Measure>(measure), is_restart != 0, limit};
  std::copy(widths.begin(), widths.end(), choice->widths);
  return ffi::Error::Success();
}

ffi::Error AdaptImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> formats,
                     ffi::ResultBuffer<ffi::U8> planes, ffi::ResultBuffer<ffi::S32> bits,
                     ffi::ResultBuffer<ffi::S32> exponents, ffi::ResultBuffer<ffi::F32> nonfinite,
                     ffi::ResultBuffer<ffi::F32> measured, ffi::ResultBuffer<ffi::F32> abs_sums,
                     ffi::ResultBuffer<ffi::F32> error_sums, ffi::ResultBuffer<ffi::S32> needed, int64_t row,
                     ffi::Span<const int64_t> widths, int64_t measure, int64_t is_restart, float limit,
                     int64_t seed, std::string_view isa) {
  const Kernels* kernels;
  if (auto error = FindIsa("adapt", isa, &kernels); error.failure()) return error;
  Choice choice;
  if (auto error = ReadChoice(widths, measure, is_restart, limit, &choice); error.failure()) return error;
  const auto batch = static_cast<int64_t>(bits->element_count()),
             size = static_cast<int64_t>(x.element_count());
  if (batch == 0) return ffi::Error::Success();
  const int64_t rows = static_cast<int64_t>(formats.element_count()) / (batch * kFormatFields);
  const int64_t limbs = LimbCount(choice.widths[choice.count - 1]), count = size / batch;
  if (row < 0 || row >= rows || static_cast<int64_t>(planes->element_count()) != limbs * size)
    return Invalid("adapt: the buffers do not fit together");
  Team team = MakeTeam(pool, size <= kSerialValues);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* fields = formats.typed_data() + (b * rows + row) * kFormatFields;
    const float* values = x.typed_data() + b * count;
    Format format{fields[0], fields[1]};
    Statistics found{};
    if (fields[2] == 1) format = ChooseFormat(*kernels, values, count, choice, format, &found, team);
    if (auto error = CheckFormat(format, limbs); error.failure()) return error;
    bits->typed_data()[b] = format.bits;
    exponents->typed_data()[b] = format.exponent;
    measured->typed_data()[b] = fields[2] == 1 ? 1 : 0;
    abs_sums->typed_data()[b] = found.abs_sum;
    std::copy(found.error_sums, found.error_sums + choice.count, error_sums->typed_data() + b * choice.count);
    std::copy(found.exponents, found.exponents + choice.count, needed->typed_data() + b * choice.count);
    const Draw draw{static_cast<uint32_t>(seed), fields[3]};
    nonfinite->typed_data()[b] =
        static_cast<float>(QuantizeTensor(*kernels, values, count, format, seed < 0 ? nullptr : &draw,
                                          planes->typed_data() + b * limbs * count, count, team));
  }
  return ffi::Error::Success();
}

// ---- Max pooling's gradient

constexpr int64_t kPoolSize = 5 * kSpace + 1;  // numbers of a `Pool`
constexpr int64_t kPoolValues = 1 << 14;       // of x, that a task should have

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

// ---- Barrier

ffi::Error BarrierImpl(ffi::AnyBuffer x, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> same) {
  if (same->size_bytes() != x.size_bytes()) return Invalid("barrier: the result differs in size from x");
  if (same->untyped_data() != x.untyped_data())
    std::memcpy(same->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_apt

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_product, jax_apt::ProductImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()   // lhs (batch, limbs, ...)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // its bits (batch)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // its exponent (batch)
                                  .Arg<ffi::Buffer<ffi::F32>>()  // its values that are not finite (batch)
                                  .Arg<ffi::Buffer<ffi::U8>>()   // rhs, likewise
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kind")
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_weight_gradient, jax_apt::WeightGradientImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()   // x (batch, limbs, ...)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // its bits (batch)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // its exponent (batch)
                                  .Arg<ffi::Buffer<ffi::F32>>()  // its values that are not finite (batch)
                                  .Arg<ffi::Buffer<ffi::F32>>()  // dy (batch, ...)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // its format (batch, 4)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // dw (batch, ...)
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<int64_t>("seed")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_quantize, jax_apt::QuantizeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x (batch, ...)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // bits (batch)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // exponents (batch)
                                  .Ret<ffi::Buffer<ffi::U8>>()   // planes (batch, limbs, ...)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // values that were not finite (batch)
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_adapt, jax_apt::AdaptImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x (batch, ...)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // formats in use (batch, rows, 4)
                                  .Ret<ffi::Buffer<ffi::U8>>()   // planes (batch, limbs, ...)
                                  .Ret<ffi::Buffer<ffi::S32>>()  // bits (batch)
                                  .Ret<ffi::Buffer<ffi::S32>>()  // exponents (batch)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // values that were not finite (batch)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // 1 where it was measured (batch)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // sum|x| (batch)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // error sums (batch, widths)
                                  .Ret<ffi::Buffer<ffi::S32>>()  // exponents needed (batch, widths)
                                  .Attr<int64_t>("row")
                                  .Attr<ffi::Span<const int64_t>>("widths")
                                  .Attr<int64_t>("measure")
                                  .Attr<int64_t>("is_restart")
                                  .Attr<float>("limit")
                                  .Attr<int64_t>("seed")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_max_pool_gradient, jax_apt::MaxPoolGradientImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x (batch, outer, in, inner)
                                  .Arg<ffi::Buffer<ffi::F32>>()  // dy (batch, outer, out, inner)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // dx, as x
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_barrier, jax_apt::BarrierImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<ffi::AnyBuffer>()    // what the result waits for
                                  .Ret<ffi::AnyBuffer>());  // x

#pragma GCC visibility pop
