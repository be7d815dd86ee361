// Whether gradients are numbers.
#include "shim.h"

#include <ATen/Parallel.h>

#include <atomic>

#include "guard.h"

namespace {

// So many values go to a thread at least: 32 KiB of floats are read faster than a thread wakes up.
constexpr int64_t kGrain = 64 * 1024;

// True if a value's exponent has all bits set, which only infinities and NaN have. The loop has no exit,
// so that it becomes a few vector instructions: it runs as fast as memory is read.
template <typename Bits>
bool any_not_finite(const Bits *bits, int64_t n, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<Bits>((bits[i] & exponent) == exponent);
  return found != 0;
}

template <typename Bits>
bool tensor_not_finite(const at::Tensor &tensor, Bits exponent) {
  const auto *bits = static_cast<const Bits *>(tensor.const_data_ptr());
  std::atomic<bool> found{false};
  at::parallel_for(0, tensor.numel(), kGrain, [&](int64_t begin, int64_t end) {
    if (any_not_finite(bits + begin, end - begin, exponent)) found.store(true);
  });
  return found.load();
}

bool not_finite(const at::Tensor &tensor) {
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "a gradient with gaps in memory");
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return tensor_not_finite<uint32_t>(tensor, 0x7f800000u);
    case at::kDouble:
      return tensor_not_finite<uint64_t>(tensor, 0x7ff0000000000000u);
    default:
      TORCH_CHECK(false, "gradients are float or double, not ", tensor.scalar_type());
  }
}

}  // namespace

extern "C" char *takuma_first_not_finite(const tensor *tensors, size_t n, size_t *found) {
  return guarded([&] {
    *found = n;
    for (size_t i = 0; i < n; ++i) {
      if (not_finite(deref(tensors[i]))) {
        *found = i;
        return;
      }
    }
  });
}
