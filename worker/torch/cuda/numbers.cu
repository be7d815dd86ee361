// Numbers of all types, for takuma's kernels, which are compiled at run time for the GPU that is there (modules.cpp),
// and by the tests as C++.
//
// No atomics, and every sum in an order that sizes alone decide: results repeat to the bit. Compiled without
// contraction; a fused multiply-add is written where one is wanted.

struct Bf16 {
  unsigned short bits;
};

template <typename T>
struct WideOf {
  typedef T type;
};
template <>
struct WideOf<Bf16> {
  typedef float type;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(Bf16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}

__device__ __forceinline__ void narrow(float v, float &out) { out = v; }
__device__ __forceinline__ void narrow(double v, double &out) { out = v; }
__device__ __forceinline__ void narrow(float v, double &out) { out = v; }
// To nearest, ties to even, as c10::BFloat16.
__device__ __forceinline__ void narrow(float v, Bf16 &out) {
  const unsigned bits = __float_as_uint(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<unsigned short>(nan ? 0x7fc0u : rounded);
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// Neighbouring values that one instruction loads.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T *from) {
  return *reinterpret_cast<const Pack<T, V> *>(from);
}

template <typename T, int V>
__device__ __forceinline__ void store(T *to, const Pack<T, V> &values) {
  *reinterpret_cast<Pack<T, V> *>(to) = values;
}
