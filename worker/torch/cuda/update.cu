// Whether an update's numbers are finite, and running statistics. Behind numbers.cu.

// Whether a word of 32 bits holds a number that is not finite; of an f64 it is the upper word.
__device__ __forceinline__ bool not_finite_word(unsigned word, int type) {
  if (type == kF32) return (word & 0x7f800000u) == 0x7f800000u;
  if (type == kF64) return (word & 0x7ff00000u) == 0x7ff00000u;
  return (word & 0x7f80u) == 0x7f80u || (word & 0x7f800000u) == 0x7f800000u;
}

__device__ __forceinline__ bool not_finite_at(const void *data, long long i, int type) {
  if (type == kF32) return not_finite_word(static_cast<const unsigned *>(data)[i], kF32);
  if (type == kF64) return not_finite_word(static_cast<const unsigned *>(data)[2 * i + 1], kF64);
  return (static_cast<const unsigned short *>(data)[i] & 0x7f80u) == 0x7f80u;
}

// The smallest of the block's numbers, in thread 0.
__device__ __forceinline__ int block_minimum(int value) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half && shared[threadIdx.x + half] < shared[threadIdx.x])
      shared[threadIdx.x] = shared[threadIdx.x + half];
  }
  return shared[0];
}

// minima[block] = the first of the table's tensors in which the block saw a value that is not finite.
extern "C" __global__ void __launch_bounds__(kThreads) takuma_scan(ScanTable table, int *minima) {
  int first = table.not_found;
  const long long start = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  const long long stride = static_cast<long long>(gridDim.x) * kThreads;
  for (int entry = 0; entry < table.entries; ++entry) {
    const void *data = table.data[entry];
    const int type = table.type[entry];
    const long long elements = table.elements[entry];
    const int per_pack = type == kF64 ? 2 : type == kF32 ? 4 : 8;
    const bool aligned = reinterpret_cast<unsigned long long>(data) % 16 == 0;
    const long long packs = aligned ? elements / per_pack : 0;
    bool bad = false;
    for (long long i = start; i < packs; i += stride) {
      const Pack<unsigned, 4> words = load<unsigned, 4>(static_cast<const unsigned *>(data) + 4 * i);
      bad |= not_finite_word(words.at[1], type) || not_finite_word(words.at[3], type);
      if (type != kF64) bad |= not_finite_word(words.at[0], type) || not_finite_word(words.at[2], type);
    }
    for (long long i = packs * per_pack + start; i < elements; i += stride)
      bad |= not_finite_at(data, i, type);
    if (bad && table.first_index + entry < first) first = table.first_index + entry;
  }
  const int least = block_minimum(first);
  if (threadIdx.x == 0) minima[blockIdx.x] = least;
}

// Whether the group of `ended`, a word of the host's memory that is not 0 from then on, is over. Read past all caches.
__device__ __forceinline__ bool has_ended(const unsigned *ended) {
  return *static_cast<const volatile unsigned *>(ended) != 0;
}

// What this rank says of all sums before this one: pair[0] = the phase's stamp, or 0 once the group has ended;
// pair[1] = what all ranks' stamps make if none has. One thread.
extern "C" __global__ void __launch_bounds__(kThreads)
    takuma_vouch(const unsigned *ended, const double *stamp, double phases, double phase, double ranks,
                 double *pair) {
  if (threadIdx.x != 0) return;
  const double whole = *stamp * phases + phase;
  pair[0] = has_ended(ended) ? 0.0 : whole;
  pair[1] = whole * ranks;
}

// The verdict over all minima, the loss and, unless they are NULL, the group's word and stamps. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    takuma_judge(const int *minima, int count, int not_found, const void *loss, int loss_type,
                 const unsigned *ended, const double *pair, float *frozen, int sticky, float *found,
                 long long *index) {
  int first = not_found;
  for (int i = threadIdx.x; i < count; i += kThreads)
    if (minima[i] < first) first = minima[i];
  const int least = block_minimum(first);
  if (threadIdx.x != 0) return;
  // A NaN in the stamps is no equality either.
  if (ended && (has_ended(ended) || !(pair[0] == pair[1]))) *frozen = kEnded;
  const bool refused = least < not_found || not_finite_at(loss, 0, loss_type) || *frozen != 0;
  *found = refused ? 1.0f : 0.0f;
  *index = least;
  if (sticky && *frozen == 0 && refused) *frozen = kNotFinite;
}

template <typename T>
__device__ __forceinline__ void mix(void *running, int channel, double fresh, double momentum) {
  T *value = static_cast<T *>(running) + channel;
  *value = static_cast<T>(static_cast<double>(*value) * (1.0 - momentum) + fresh * momentum);
}

// Running statistics of layer blockIdx.y. The same roundings as statistics.cpp.
extern "C" __global__ void __launch_bounds__(kThreads)
    takuma_commit_statistics(LayerTable table, const float *found) {
  if (found && *found == 1.0f) return;
  const int layer = blockIdx.y, channel = blockIdx.x * kThreads + threadIdx.x;
  const int channels = table.channels[layer];
  if (channel >= channels) return;
  const double *batch = table.batch[layer] + channel;
  for (int group = 0; group < table.groups[layer]; ++group, batch += 2 * channels) {
    const double variance = batch[channels] * table.unbiased[layer];
    if (table.type[layer] == kF64) {
      mix<double>(table.mean[layer], channel, batch[0], table.momentum);
      mix<double>(table.variance[layer], channel, variance, table.momentum);
    } else {
      mix<float>(table.mean[layer], channel, batch[0], table.momentum);
      mix<float>(table.variance[layer], channel, variance, table.momentum);
    }
  }
}
