// Scratch memory of one call. A few blocks are kept between calls: fresh ones would cost a page fault for
// every 4 KiB at each call, as long as a small product itself.
#ifndef JAX_APT_XLA_OPS_SCRATCH_H_
#define JAX_APT_XLA_OPS_SCRATCH_H_

#include <cstddef>
#include <cstdint>

namespace jax_apt {

class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() const { return data_; }  // 64-byte aligned, uninitialized; null if there is no memory

 private:
  uint8_t* data_;
  size_t bytes_;
};

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_SCRATCH_H_
