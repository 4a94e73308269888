// XLA's view of the kernels: unpacks and validates buffers, and exports the FFI handlers.
#include <string>
#include <vector>

#include "batch.h"
#include "dispatch.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_apt {
namespace {

bool ToDType(ffi::DataType type, DType* dtype, int64_t* bytes) {
  switch (type) {
    case ffi::DataType::F32: *dtype = DType::kF32, *bytes = 4; return true;
    case ffi::DataType::S8: *dtype = DType::kS8, *bytes = 1; return true;
    case ffi::DataType::S16: *dtype = DType::kS16, *bytes = 2; return true;
    case ffi::DataType::S32: *dtype = DType::kS32, *bytes = 4; return true;
    default: return false;
  }
}

// A stack of matrices.
struct Matrices {
  DType dtype;
  int64_t bytes, batch, rows, columns;  // rows and columns as stored
};

ffi::Error Unpack(const ffi::AnyBuffer& buffer, const char* name, Matrices* out) {
  const auto dims = buffer.dimensions();
  if (dims.size() < 2)
    return ffi::Error::InvalidArgument(std::string("gemm: ") + name + " needs at least 2 dimensions");
  if (!ToDType(buffer.element_type(), &out->dtype, &out->bytes))
    return ffi::Error::InvalidArgument(std::string("gemm: ") + name +
                                       " must be float32, int8, int16 or int32");
  out->batch = 1;
  for (size_t i = 0; i + 2 < dims.size(); ++i) out->batch *= dims[i];
  out->rows = dims[dims.size() - 2];
  out->columns = dims[dims.size() - 1];
  return ffi::Error::Success();
}

// All threads of XLA's pool if there is work for them.
int Workers(const ffi::ThreadPool& pool, double multiply_adds) {
  return multiply_adds < kSerialMultiplyAdds ? 1 : static_cast<int>(pool.num_threads());
}

ffi::Error RunOnPool(const Kernels& kernels, const std::vector<Gemm>& gemms, ffi::ThreadPool& pool) {
  const Gemm& g = gemms[0];
  const double multiply_adds = static_cast<double>(g.m) * g.n * g.k * gemms.size();
  Team team(Workers(pool, multiply_adds),
            [&pool](std::function<void()> task) { pool.Schedule([task = std::move(task)] { task(); }); });
  if (RunBatch(kernels, gemms, team)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "gemm: no memory for scratch");
}

ffi::Error GemmImpl(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                    ffi::Buffer<ffi::S32> formats, ffi::ResultBuffer<ffi::F32> out, bool lhs_transposed,
                    bool rhs_transposed, std::string_view isa) {
  Matrices a, b;
  if (auto error = Unpack(lhs, "lhs", &a); error.failure()) return error;
  if (auto error = Unpack(rhs, "rhs", &b); error.failure()) return error;
  const int64_t m = lhs_transposed ? a.columns : a.rows, k = lhs_transposed ? a.rows : a.columns;
  const int64_t n = rhs_transposed ? b.rows : b.columns, rhs_k = rhs_transposed ? b.columns : b.rows;
  if (k != rhs_k)
    return ffi::Error::InvalidArgument("gemm: depth of lhs " + std::to_string(k) + " != depth of rhs " +
                                       std::to_string(rhs_k));
  const int64_t format_count = static_cast<int64_t>(formats.element_count()) / 4;
  if (a.batch != b.batch || static_cast<int64_t>(out->element_count()) != a.batch * m * n)
    return ffi::Error::InvalidArgument("gemm: batch of lhs " + std::to_string(a.batch) + ", of rhs " +
                                       std::to_string(b.batch) + " and the result do not agree");
  if (a.batch == 0) return ffi::Error::Success();
  if (format_count == 0 || a.batch % format_count != 0)
    return ffi::Error::InvalidArgument("gemm: " + std::to_string(format_count) + " formats for a batch of " +
                                       std::to_string(a.batch));
  const Kernels* kernels = FindKernels(std::string(isa).c_str());
  if (kernels == nullptr)
    return ffi::Error::InvalidArgument("gemm: ISA '" + std::string(isa) +
                                       "' (or JAX_APT_ISA) cannot run here; available: " + AvailableIsas());

  const auto* lhs_data = static_cast<const char*>(lhs.untyped_data());
  const auto* rhs_data = static_cast<const char*>(rhs.untyped_data());
  std::vector<Gemm> gemms(a.batch);
  for (int64_t i = 0; i < a.batch; ++i) {
    const int32_t* f = formats.typed_data() + i / (a.batch / format_count) * 4;
    gemms[i] = {{lhs_data + i * m * k * a.bytes, a.dtype, lhs_transposed, f[0], f[1]},
                {rhs_data + i * k * n * b.bytes, b.dtype, rhs_transposed, f[2], f[3]},
                out->typed_data() + i * m * n,
                m,
                n,
                k};
    int64_t value;
    if (const char* error = FindFormatError(gemms[i], &value))
      return ffi::Error::InvalidArgument(std::string("gemm: ") + error + ", got " + std::to_string(value));
  }
  return RunOnPool(*kernels, gemms, pool);
}

}  // namespace
}  // namespace jax_apt

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_apt_gemm, jax_apt::GemmImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // lhs (..., M, K) or (..., K, M)
                                  .Arg<ffi::AnyBuffer>()         // rhs (..., K, N) or (..., N, K)
                                  .Arg<ffi::Buffer<ffi::S32>>()  // formats (..., 4)
                                  .Ret<ffi::Buffer<ffi::F32>>()  // (..., M, N)
                                  .Attr<bool>("lhs_transposed")
                                  .Attr<bool>("rhs_transposed")
                                  .Attr<std::string_view>("isa"));

#pragma GCC visibility pop
