// Batch normalisation over channels_last rows. Behind numbers.cu.

// Where a thread works: a pack of channels, and rows `first`, `first + lanes`, ... below `last`.
struct Place {
  bool valid;
  int lane, channel;
  long long base, first, last;
};

template <int V>
__device__ __forceinline__ Place place_of(const RowPlan &plan) {
  const int thread = threadIdx.x, lane = thread / plan.tile;
  const int column = blockIdx.y * plan.tile + thread % plan.tile;
  Place place;
  place.lane = lane;
  place.channel = column * V;
  place.valid = lane < plan.lanes && place.channel < plan.channels;
  place.base = static_cast<long long>(blockIdx.z) * plan.rows * plan.channels + place.channel;
  place.first = blockIdx.x * plan.rows_per_block + lane;
  const long long end = (blockIdx.x + 1) * plan.rows_per_block;
  place.last = end < plan.rows ? end : plan.rows;
  return place;
}

// So many rows are summed in the narrow type before they go into the double sums.
enum { kNarrowRows = 16 };

// Sums two numbers of each value over the block's rows, and writes them to partial [groups, row_blocks, 2, channels].
// row(offset of a pack, a, b) adds one row's.
template <typename W, int V, typename Row>
__device__ __forceinline__ void block_sums(const RowPlan &plan, double *partial, Row row) {
  __shared__ double shared[2 * V * kThreads];
  const Place place = place_of<V>(plan);
  double sums[2 * V];
#pragma unroll
  for (int k = 0; k < 2 * V; ++k) sums[k] = 0;
  if (place.valid) {
    long long r = place.first;
    while (r < place.last) {
      W a[V], b[V];
#pragma unroll
      for (int k = 0; k < V; ++k) a[k] = b[k] = 0;
#pragma unroll 4
      for (int i = 0; i < kNarrowRows; ++i, r += plan.lanes)
        if (r < place.last) row(place.base + r * plan.channels, a, b);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        sums[k] += a[k];
        sums[V + k] += b[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 2 * V; ++k) shared[k * kThreads + threadIdx.x] = sums[k];
  for (int half = plan.lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (place.lane < half) {
      const int other = threadIdx.x + half * plan.tile;
#pragma unroll
      for (int k = 0; k < 2 * V; ++k)
        shared[k * kThreads + threadIdx.x] += shared[k * kThreads + other];
    }
  }
  // Each thread of lane 0 reads what it wrote itself.
  if (place.lane == 0 && place.valid) {
    const long long block = static_cast<long long>(blockIdx.z) * plan.row_blocks + blockIdx.x;
    double *out = partial + block * 2 * plan.channels + place.channel;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out[k] = shared[k * kThreads + threadIdx.x];
      out[plan.channels + k] = shared[(V + k) * kThreads + threadIdx.x];
    }
  }
}

// The share of z that the activation lets pass.
template <typename W>
__device__ __forceinline__ W passed(W z, W slope) {
  return z > 0 ? W(1) : slope;
}

// Scale and shift, or by_x and constant, of a thread's channels: two rows of a [groups, 2, channels] table.
template <typename W, int V>
struct Numbers {
  W first[V], second[V];
};

template <typename W, int V>
__device__ __forceinline__ Numbers<W, V> numbers_of(const W *table, const RowPlan &plan,
                                                    const Place &place) {
  Numbers<W, V> out;
  const W *at = table + static_cast<long long>(blockIdx.z) * 2 * plan.channels + place.channel;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    out.first[k] = place.valid ? at[k] : W(0);
    out.second[k] = place.valid ? at[plan.channels + k] : W(0);
  }
  return out;
}

// Sums of x and x^2.
template <typename T, int V>
__device__ __forceinline__ void moments(const T *x, RowPlan plan, double *partial) {
  typedef typename WideOf<T>::type W;
  block_sums<W, V>(plan, partial, [&](long long offset, W *a, W *b) {
    const Pack<T, V> values = load<T, V>(x + offset);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W v = widen(values.at[k]);
      a[k] += v;
      b[k] = fused(v, v, b[k]);
    }
  });
}

// y = act(scale * x + shift)
template <typename T, int V>
__device__ __forceinline__ void normalize(const T *x, T *y, RowPlan plan,
                                          const typename WideOf<T>::type *maps, double slope) {
  typedef typename WideOf<T>::type W;
  const Place place = place_of<V>(plan);
  if (!place.valid) return;
  const Numbers<W, V> map = numbers_of<W, V>(maps, plan, place);
  const W leak = static_cast<W>(slope);
#pragma unroll 4
  for (long long r = place.first; r < place.last; r += plan.lanes) {
    const long long offset = place.base + r * plan.channels;
    const Pack<T, V> values = load<T, V>(x + offset);
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W z = fused(map.first[k], widen(values.at[k]), map.second[k]);
      narrow(z * passed(z, leak), out.at[k]);
    }
    store<T, V>(y + offset, out);
  }
}

// With dz = dy * act'(scale * x + shift): sums of dz and dz * x.
template <typename T, int V>
__device__ __forceinline__ void gradient_sums(const T *x, const T *dy, RowPlan plan,
                                              const typename WideOf<T>::type *maps, double slope,
                                              double *partial) {
  typedef typename WideOf<T>::type W;
  const Numbers<W, V> map = numbers_of<W, V>(maps, plan, place_of<V>(plan));
  const W leak = static_cast<W>(slope);
  block_sums<W, V>(plan, partial, [&](long long offset, W *a, W *b) {
    const Pack<T, V> values = load<T, V>(x + offset), up = load<T, V>(dy + offset);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W v = widen(values.at[k]);
      const W dz = widen(up.at[k]) * passed(fused(map.first[k], v, map.second[k]), leak);
      a[k] += dz;
      b[k] = fused(dz, v, b[k]);
    }
  });
}

// dx = scale * dz + by_x * x + constant
template <typename T, int V>
__device__ __forceinline__ void gradient(const T *x, const T *dy, T *dx, RowPlan plan,
                                         const typename WideOf<T>::type *maps,
                                         const typename WideOf<T>::type *coefficients,
                                         double slope) {
  typedef typename WideOf<T>::type W;
  const Place place = place_of<V>(plan);
  if (!place.valid) return;
  const Numbers<W, V> map = numbers_of<W, V>(maps, plan, place);
  const Numbers<W, V> linear = numbers_of<W, V>(coefficients, plan, place);
  const W leak = static_cast<W>(slope);
#pragma unroll 2
  for (long long r = place.first; r < place.last; r += plan.lanes) {
    const long long offset = place.base + r * plan.channels;
    const Pack<T, V> values = load<T, V>(x + offset), up = load<T, V>(dy + offset);
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const W v = widen(values.at[k]);
      const W dz = widen(up.at[k]) * passed(fused(map.first[k], v, map.second[k]), leak);
      narrow(fused(map.first[k], dz, fused(linear.first[k], v, linear.second[k])), out.at[k]);
    }
    store<T, V>(dx + offset, out);
  }
}

// Both sums of one channel and group, complete in lane 0: of the partial sums, or read from `sums`.
__device__ __forceinline__ void channel_sums(const NormPlan &plan, const double *partial,
                                             const double *sums, int group, int channel,
                                             double &first, double &second) {
  __shared__ double shared[2][kColumns * kLanes];
  const int thread = threadIdx.x, lane = thread / kColumns;
  const bool valid = channel < plan.channels;
  first = second = 0;
  if (!(plan.mode & kCombine)) {
    if (valid && lane == 0) {
      const double *at = sums + static_cast<long long>(group) * 2 * plan.channels + channel;
      first = at[0];
      second = at[plan.channels];
    }
    return;
  }
  if (valid) {
    const double *at =
        partial + static_cast<long long>(group) * plan.row_blocks * 2 * plan.channels + channel;
#pragma unroll 4
    for (int block = lane; block < plan.row_blocks; block += kLanes) {
      first += at[static_cast<long long>(block) * 2 * plan.channels];
      second += at[(static_cast<long long>(block) * 2 + 1) * plan.channels];
    }
  }
  // The group before may still be read.
  __syncthreads();
  shared[0][thread] = first;
  shared[1][thread] = second;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) {
      shared[0][thread] += shared[0][thread + half * kColumns];
      shared[1][thread] += shared[1][thread + half * kColumns];
    }
  }
  first = shared[0][thread];
  second = shared[1][thread];
}

// From the sums to statistics, and to scale and shift.
template <typename W>
__device__ __forceinline__ void finish_forward(NormPlan plan, const double *partial, double *sums,
                                               const W *weight, const W *bias, double *stats,
                                               W *maps) {
  const int channel = blockIdx.x * kColumns + threadIdx.x % kColumns;
  const bool writes = threadIdx.x < kColumns && channel < plan.channels;
  for (int group = 0; group < plan.groups; ++group) {
    double sum, squares;
    channel_sums(plan, partial, sums, group, channel, sum, squares);
    if (!writes) continue;
    const long long at = static_cast<long long>(group) * 2 * plan.channels + channel;
    if (!(plan.mode & kFinish)) {
      sums[at] = sum;
      sums[at + plan.channels] = squares;
      continue;
    }
    const double mean = sum / plan.count;
    const double spread = squares / plan.count - mean * mean;
    // Not fmax, which would make a variance of 0 of a NaN.
    const double variance = spread < 0 ? 0.0 : spread;
    stats[at] = mean;
    stats[at + plan.channels] = variance;
    const double scale = weight[channel] / sqrt(variance + plan.eps);
    maps[at] = static_cast<W>(scale);
    maps[at + plan.channels] = static_cast<W>(bias[channel] - mean * scale);
  }
}

// From the sums to the parameters' gradients, and to by_x and constant.
template <typename W>
__device__ __forceinline__ void finish_backward(NormPlan plan, const double *partial, double *sums,
                                                const W *weight, const double *stats, W *dweight,
                                                W *dbias, W *coefficients) {
  const int channel = blockIdx.x * kColumns + threadIdx.x % kColumns;
  const bool writes = threadIdx.x < kColumns && channel < plan.channels;
  double bias_sum = 0, weight_sum = 0;
  for (int group = 0; group < plan.groups; ++group) {
    double sum, by_xhat;
    channel_sums(plan, partial, sums, group, channel, sum, by_xhat);
    if (!writes) continue;
    const long long at = static_cast<long long>(group) * 2 * plan.channels + channel;
    const double mean = stats[at];
    const double deviation = sqrt(stats[at + plan.channels] + plan.eps);
    if (plan.mode & kCombine) {
      // From sum dz * x to sum dz * xhat. These are this worker's shares, before any exchange.
      by_xhat = (by_xhat - mean * sum) / deviation;
      bias_sum += sum;
      weight_sum += by_xhat;
    }
    if (!(plan.mode & kFinish)) {
      sums[at] = sum;
      sums[at + plan.channels] = by_xhat;
      continue;
    }
    const double inverse = 1.0 / deviation;
    const double scale = weight[channel] * inverse;
    const double slope_of_x = -scale * inverse * by_xhat / plan.count;
    coefficients[at] = static_cast<W>(slope_of_x);
    coefficients[at + plan.channels] = static_cast<W>(-scale * sum / plan.count - slope_of_x * mean);
  }
  if (writes && (plan.mode & kCombine)) {
    dbias[channel] = static_cast<W>(bias_sum);
    dweight[channel] = static_cast<W>(weight_sum);
  }
}

#define TAKUMA_ROWS(NAME, T, W, V)                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                                               \
      takuma_moments_##NAME(const T *x, RowPlan plan, double *partial) {                               \
    moments<T, V>(x, plan, partial);                                                                   \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads)                                               \
      takuma_normalize_##NAME(const T *x, T *y, RowPlan plan, const W *maps, double slope) {           \
    normalize<T, V>(x, y, plan, maps, slope);                                                          \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads)                                               \
      takuma_gradient_sums_##NAME(const T *x, const T *dy, RowPlan plan, const W *maps, double slope,  \
                                  double *partial) {                                                   \
    gradient_sums<T, V>(x, dy, plan, maps, slope, partial);                                            \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads)                                               \
      takuma_gradient_##NAME(const T *x, const T *dy, T *dx, RowPlan plan, const W *maps,              \
                             const W *coefficients, double slope) {                                    \
    gradient<T, V>(x, dy, dx, plan, maps, coefficients, slope);                                        \
  }

#define TAKUMA_FINISH(NAME, W)                                                                         \
  extern "C" __global__ void __launch_bounds__(kColumns *kLanes)                                       \
      takuma_finish_forward_##NAME(NormPlan plan, const double *partial, double *sums,                 \
                                   const W *weight, const W *bias, double *stats, W *maps) {           \
    finish_forward<W>(plan, partial, sums, weight, bias, stats, maps);                                 \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kColumns *kLanes)                                       \
      takuma_finish_backward_##NAME(NormPlan plan, const double *partial, double *sums,                \
                                    const W *weight, const double *stats, W *dweight, W *dbias,        \
                                    W *coefficients) {                                                 \
    finish_backward<W>(plan, partial, sums, weight, stats, dweight, dbias, coefficients);              \
  }

TAKUMA_ROWS(f32_4, float, float, 4)
TAKUMA_ROWS(f32_1, float, float, 1)
TAKUMA_ROWS(f64_2, double, double, 2)
TAKUMA_ROWS(f64_1, double, double, 1)
TAKUMA_ROWS(bf16_8, Bf16, float, 8)
TAKUMA_ROWS(bf16_1, Bf16, float, 1)
TAKUMA_FINISH(f32, float)
TAKUMA_FINISH(f64, double)
