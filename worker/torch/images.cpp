// Images from where they are kept to where they are computed with.
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_strided.h>

#include "cuda/table.h"
#include "guard.h"

namespace {

template <typename T>
void gather(const uint8_t *images, const int64_t *rows, T *target, int64_t count, int64_t bytes) {
  // All that a pixel can become.
  T scaled[256];
  for (int p = 0; p < 256; ++p) scaled[p] = static_cast<T>(static_cast<float>(p) / 127.5f - 1.0f);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t *image = images + rows[i] * bytes;
      for (int64_t b = 0; b < bytes; ++b) target[i * bytes + b] = scaled[image[b]];
    }
  });
}

void check_gather(const at::Tensor &images, const at::Tensor &rows, const at::Tensor &target) {
  TORCH_CHECK(images.dim() == 4 && images.size(3) == 3 && images.scalar_type() == at::kByte &&
                  images.is_contiguous() && images.size(0) > 0,
              "images are uint8 [R, H, W, 3], dense and at least one, not ", images.sizes());
  TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == at::kLong && rows.is_contiguous(),
              "rows are int64 [N], not ", rows.sizes());
  TORCH_CHECK(target.dim() == 4 && target.size(0) == rows.size(0) && target.size(1) == 3 &&
                  target.size(2) == images.size(1) && target.size(3) == images.size(2) &&
                  target.permute({0, 2, 3, 1}).is_contiguous(),
              "the target is [", rows.size(0), ", 3, ", images.size(1), ", ", images.size(2),
              "], channels_last, not ", target.sizes(), " with strides ", target.strides());
  TORCH_CHECK(images.device() == target.device() && rows.device() == target.device(),
              "images, rows and target on more than one device");
}

}  // namespace

extern "C" char *takuma_copy_async(tensor target, tensor source) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TORCH_CHECK(deref(target).sizes() == deref(source).sizes(), "copy of ", deref(source).sizes(),
                " into ", deref(target).sizes());
    deref(target).copy_(deref(source), /*non_blocking=*/true);
  });
}

extern "C" char *takuma_copy_all(const tensor *targets, const tensor *sources, size_t n) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    // Tensors of one type go in one launch or two, mixed ones one by one.
    std::vector<at::Tensor> into[2], from[2];
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor &target = deref(targets[i]), &source = deref(sources[i]);
      TORCH_CHECK(target.sizes() == source.sizes(), "copy of ", source.sizes(), " into ", target.sizes());
      const bool other = source.scalar_type() != deref(sources[0]).scalar_type();
      into[other].push_back(target);
      from[other].push_back(source);
    }
    for (const bool other : {false, true})
      if (!from[other].empty()) at::_foreach_copy_(into[other], from[other], /*non_blocking=*/true);
  });
}

extern "C" char *takuma_gather_images(tensor images, tensor rows, tensor target) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::Tensor &from = deref(images), &which = deref(rows), &into = deref(target);
    check_gather(from, which, into);
    if (into.is_cuda()) {
      cuda_table().gather_images(from, which, into);
      return;
    }
    const int64_t *numbers = which.const_data_ptr<int64_t>(), count = which.numel();
    for (int64_t i = 0; i < count; ++i)
      TORCH_CHECK(numbers[i] >= 0 && numbers[i] < from.size(0), "image ", numbers[i], " of ",
                  from.size(0));
    const int64_t bytes = from.size(1) * from.size(2) * 3;
    const uint8_t *pixels = from.const_data_ptr<uint8_t>();
    switch (into.scalar_type()) {
      case at::kFloat:
        return gather(pixels, numbers, into.mutable_data_ptr<float>(), count, bytes);
      case at::kDouble:
        return gather(pixels, numbers, into.mutable_data_ptr<double>(), count, bytes);
      case at::kBFloat16:
        return gather(pixels, numbers, into.mutable_data_ptr<at::BFloat16>(), count, bytes);
      default:
        TORCH_CHECK(false, "images become float, double or bfloat16, not ", into.scalar_type());
    }
  });
}

extern "C" char *takuma_host_like(tensor like, int32_t is_pinned, tensor *host) {
  return guarded([&] {
    const at::Tensor &wanted = deref(like);
    const auto options = at::TensorOptions().dtype(wanted.scalar_type()).pinned_memory(is_pinned != 0);
    *host = new at::Tensor(at::empty_strided(wanted.sizes(), wanted.strides(), options));
  });
}
