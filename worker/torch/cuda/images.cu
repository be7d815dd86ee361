// Images out of the GPU's memory. Behind numbers.cu.

// Image blockIdx.y of the batch, V bytes a thread.
template <typename T, int V>
__device__ __forceinline__ void gather(const unsigned char *images, const long long *rows,
                                       T *target, long long bytes, long long count) {
  const long long at = (static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at >= bytes) return;
  const long long wanted = rows[blockIdx.y];
  const long long row = wanted < 0 ? 0 : wanted < count ? wanted : count - 1;
  const Pack<unsigned char, V> pixels = load<unsigned char, V>(images + row * bytes + at);
  Pack<T, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) narrow(static_cast<float>(pixels.at[k]) / 127.5f - 1.0f, out.at[k]);
  store<T, V>(target + blockIdx.y * bytes + at, out);
}

#define TAKUMA_GATHER(NAME, T, V)                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads)                                               \
      takuma_gather_##NAME(const unsigned char *images, const long long *rows, T *target,              \
                           long long bytes, long long count) {                                         \
    gather<T, V>(images, rows, target, bytes, count);                                                  \
  }

TAKUMA_GATHER(f32_4, float, 4)
TAKUMA_GATHER(f32_1, float, 1)
TAKUMA_GATHER(f64_2, double, 2)
TAKUMA_GATHER(f64_1, double, 1)
TAKUMA_GATHER(bf16_8, Bf16, 8)
TAKUMA_GATHER(bf16_1, Bf16, 1)
