// Whether an update's numbers are finite, and Adam.
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/zeros.h>

#include <atomic>

#include "cuda/kernel_types.h"
#include "cuda/table.h"
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

void check_gradient(const at::Tensor &tensor, const at::Device &device) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "a gradient with gaps in memory");
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16,
              "gradients are float, double or bfloat16, not ", type);
  TORCH_CHECK(tensor.device() == device, "gradients on ", tensor.device(), " and ", device);
}

bool not_finite(const at::Tensor &tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return tensor_not_finite<uint32_t>(tensor, 0x7f800000u);
    case at::kDouble:
      return tensor_not_finite<uint64_t>(tensor, 0x7ff0000000000000u);
    default:
      return tensor_not_finite<uint16_t>(tensor, 0x7f80u);
  }
}

int64_t first_not_finite(const std::vector<at::Tensor> &tensors) {
  for (size_t i = 0; i < tensors.size(); ++i)
    if (not_finite(tensors[i])) return static_cast<int64_t>(i);
  return static_cast<int64_t>(tensors.size());
}

}  // namespace

extern "C" char *takuma_first_not_finite(const tensor *tensors, size_t n, size_t *found) {
  return guarded([&] {
    *found = n;
    if (n == 0) return;
    const auto all = list(tensors, n);
    for (const auto &one : all) check_gradient(one, all[0].device());
    if (all[0].is_cuda()) {
      const auto options = all[0].options();
      const auto zero = at::zeros({}, options.dtype(at::kFloat));
      auto verdict = at::zeros({}, options.dtype(at::kFloat));
      auto index = at::zeros({}, options.dtype(at::kLong));
      cuda_table().guard(all, zero, nullptr, {}, zero, false, verdict, index);
      *found = static_cast<size_t>(index.item<int64_t>());
    } else {
      *found = static_cast<size_t>(first_not_finite(all));
    }
  });
}

namespace {

bool has_ended(const uint32_t *ended) { return __atomic_load_n(ended, __ATOMIC_ACQUIRE) != 0; }

void check_pair(const at::Tensor &pair, const at::Device &device) {
  TORCH_CHECK(pair.numel() == 2 && pair.scalar_type() == at::kDouble && pair.is_contiguous() &&
                  pair.device() == device,
              "a rank's stamps are double [2] on the device of what they are made of");
}

}  // namespace

extern "C" char *takuma_vouch(const uint32_t *ended, tensor stamp, double phases, double phase,
                              double ranks, tensor pair) {
  return guarded([&] {
    const at::Tensor &number = deref(stamp);
    at::Tensor &into = deref(pair);
    TORCH_CHECK(ended, "a group has a word for its end");
    TORCH_CHECK(number.numel() == 1 && number.scalar_type() == at::kDouble, "a stamp is a double");
    check_pair(into, number.device());
    if (number.is_cuda()) {
      cuda_table().vouch(ended, number, phases, phase, ranks, into);
      return;
    }
    const double whole = *number.const_data_ptr<double>() * phases + phase;
    double *values = into.mutable_data_ptr<double>();
    values[0] = has_ended(ended) ? 0.0 : whole;
    values[1] = whole * ranks;
  });
}

extern "C" char *takuma_guard(const tensor *gradients, size_t n, tensor loss, const uint32_t *ended,
                              tensor pair, tensor frozen, int sticky, tensor found, tensor index) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const auto all = list(gradients, n);
    at::Tensor &ice = deref(frozen), &verdict = deref(found), &place = deref(index);
    const auto device = verdict.device();
    for (const auto &one : all) check_gradient(one, device);
    check_gradient(deref(loss), device);
    TORCH_CHECK(deref(loss).numel() == 1, "the loss is one number");
    for (const auto *scalar : {&ice, &verdict})
      TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == at::kFloat &&
                      scalar->device() == device,
                  "the guard's verdicts are float scalars on one device");
    TORCH_CHECK(place.numel() == 1 && place.scalar_type() == at::kLong && place.device() == device,
                "the guard's index is an int64 scalar on the device of its verdicts");
    TORCH_CHECK(!ended == !pair, "a group has both a word for its end and stamps");
    at::Tensor stamps;
    if (pair) {
      stamps = deref(pair);
      check_pair(stamps, device);
    }
    if (device.is_cuda()) {
      cuda_table().guard(all, deref(loss), ended, stamps, ice, sticky != 0, verdict, place);
      return;
    }
    float &frozen_by = *ice.mutable_data_ptr<float>();
    if (ended) {
      const double *values = stamps.const_data_ptr<double>();
      // A NaN in the stamps is no equality either.
      if (has_ended(ended) || !(values[0] == values[1])) frozen_by = kEnded;
    }
    const int64_t first = first_not_finite(all);
    const bool refused = first < static_cast<int64_t>(n) || not_finite(deref(loss)) ||
                         frozen_by != 0;
    *verdict.mutable_data_ptr<float>() = refused ? 1.0f : 0.0f;
    *place.mutable_data_ptr<int64_t>() = first;
    if (sticky && frozen_by == 0 && refused) frozen_by = kNotFinite;
  });
}

extern "C" char *takuma_fused_adam(const tensor *params, const tensor *grads, const tensor *exp_avgs,
                                   const tensor *exp_avg_sqs, const tensor *steps, size_t n,
                                   tensor found_inf, double lr, double beta1, double beta2,
                                   double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    if (n == 0) return;
    const auto counted = list(steps, n);
    std::optional<at::Tensor> found;
    if (found_inf) found = deref(found_inf);
    at::_foreach_add_(counted, 1);
    at::_fused_adam_(list(params, n), list(grads, n), list(exp_avgs, n), list(exp_avg_sqs, n), {},
                     counted, lr, beta1, beta2, /*weight_decay=*/0.0, eps, /*amsgrad=*/false,
                     /*maximize=*/false, /*grad_scale=*/{}, found);
    // As PyTorch's own optimizer does: a step that was refused is taken back, on the device.
    if (found) at::_foreach_sub_(counted, std::vector<at::Tensor>(n, *found));
  });
}
