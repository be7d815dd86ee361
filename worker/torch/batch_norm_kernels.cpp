// See batch_norm_kernels.h. TAKUMA_ISA names the namespace; the flags decide the instructions.
#include "batch_norm_kernels.h"

#include <algorithm>
#include <vector>

namespace TAKUMA_ISA {
namespace {

// So many rows are summed in T before they go into the double sums: few enough that a float sum
// loses nothing that matters, many enough that the conversion costs nothing.
constexpr int64_t kBlockRows = 32;
// So many channels are kept in registers while a block is walked.
constexpr int64_t kLanes = 32;

// The share of z that the activation lets pass. A choice between two constants becomes a blend; written
// as a choice between two products it becomes a branch that half of all values mispredict.
template <typename T>
inline T passed(T z, T slope) {
  return z > 0 ? T(1) : slope;
}

template <typename T, typename Row>
inline void block_sums(int64_t rows, int64_t channels, double *sums, Row row) {
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const int64_t last = std::min(first + kBlockRows, rows);
    for (int64_t c0 = 0; c0 < channels; c0 += kLanes) {
      const int64_t lanes = std::min(kLanes, channels - c0);
      T a[kLanes] = {}, b[kLanes] = {};
      if (lanes == kLanes) {
        for (int64_t r = first; r < last; ++r)
          for (int64_t i = 0; i < kLanes; ++i) row(r * channels + c0 + i, c0 + i, a[i], b[i]);
      } else {
        for (int64_t r = first; r < last; ++r)
          for (int64_t i = 0; i < lanes; ++i) row(r * channels + c0 + i, c0 + i, a[i], b[i]);
      }
      for (int64_t i = 0; i < lanes; ++i) {
        sums[c0 + i] += a[i];
        sums[channels + c0 + i] += b[i];
      }
    }
  }
}

template <typename T>
void moments(const T *x, int64_t rows, int64_t channels, double *sums) {
  block_sums<T>(rows, channels, sums, [=](int64_t at, int64_t, T &a, T &b) {
    const T v = x[at];
    a += v;
    b += v * v;
  });
}

template <typename T>
void normalize(const T *__restrict x, T *__restrict y, int64_t rows, int64_t channels,
               const T *__restrict scale, const T *__restrict shift, T slope) {
  for (int64_t r = 0; r < rows; ++r) {
    const T *__restrict in = x + r * channels;
    T *__restrict out = y + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const T v = scale[c] * in[c] + shift[c];
      out[c] = v * passed(v, slope);
    }
  }
}

template <typename T>
void gradient_sums(const T *x, const T *dy, int64_t rows, int64_t channels, const T *scale,
                   const T *shift, T slope, double *sums) {
  block_sums<T>(rows, channels, sums, [=](int64_t at, int64_t c, T &a, T &b) {
    const T v = x[at];
    const T dz = dy[at] * passed(scale[c] * v + shift[c], slope);
    a += dz;
    b += dz * v;
  });
}

template <typename T>
void gradient(const T *__restrict x, const T *__restrict dy, T *__restrict dx, int64_t rows,
              int64_t channels, const T *__restrict scale, const T *__restrict shift, T slope,
              const T *__restrict by_x, const T *__restrict constant) {
  for (int64_t r = 0; r < rows; ++r) {
    const T *__restrict in = x + r * channels;
    const T *__restrict up = dy + r * channels;
    T *__restrict out = dx + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const T v = in[c];
      const T dz = up[c] * passed(scale[c] * v + shift[c], slope);
      out[c] = scale[c] * dz + by_x[c] * v + constant[c];
    }
  }
}

}  // namespace

extern const BatchNormKernels<float> float_kernels = {moments<float>, normalize<float>,
                                                      gradient_sums<float>, gradient<float>};
extern const BatchNormKernels<double> double_kernels = {moments<double>, normalize<double>,
                                                        gradient_sums<double>, gradient<double>};

}  // namespace TAKUMA_ISA
