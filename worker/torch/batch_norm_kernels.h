// Row-wise loops of batch normalisation over channels_last memory: `rows` rows of `channels` values.
// Compiled once per instruction set (batch_norm_kernels.cpp); dispatched in batch_norm.cpp.
#pragma once
#include <stdint.h>

template <typename T>
struct BatchNormKernels {
  // sums[c] += sum x, sums[channels + c] += sum x^2
  void (*moments)(const T *x, int64_t rows, int64_t channels, double *sums);
  // y = act(scale * x + shift)
  void (*normalize)(const T *x, T *y, int64_t rows, int64_t channels, const T *scale,
                    const T *shift, T slope);
  // With dz = dy * act'(scale * x + shift): sums[c] += sum dz, sums[channels + c] += sum dz * x
  void (*gradient_sums)(const T *x, const T *dy, int64_t rows, int64_t channels, const T *scale,
                        const T *shift, T slope, double *sums);
  // dx = scale * dz + by_x * x + constant
  void (*gradient)(const T *x, const T *dy, T *dx, int64_t rows, int64_t channels, const T *scale,
                   const T *shift, T slope, const T *by_x, const T *constant);
};

namespace baseline {
extern const BatchNormKernels<float> float_kernels;
extern const BatchNormKernels<double> double_kernels;
}  // namespace baseline
namespace avx2 {
extern const BatchNormKernels<float> float_kernels;
extern const BatchNormKernels<double> double_kernels;
}  // namespace avx2
