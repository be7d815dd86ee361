// The border between the shim, which is always linked, and its CUDA library, which is opened at run time.
//
// Both are compiled from this header in one build, so C++ types and exceptions may cross.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "../shim.h"

// Rises with each change of the table or of a type in it; the size is compared too.
constexpr uint32_t kCudaTableVersion = 2;

// One layer's running statistics and what is mixed into them.
struct RunningStatistics {
  at::Tensor mean, variance, batch;
  double unbiased;  // factor from a biased to an unbiased variance
};

// Sums double [lanes, groups, 2, C], the rows of this worker's lanes, over all lanes of all workers: double
// [groups, 2, C], which may be the memory of the only row.
struct BatchSumReducer {
  virtual ~BatchSumReducer() = default;
  virtual at::Tensor sum(const at::Tensor &rows) const = 0;
};

// The sizes and numbers of one batch normalisation.
struct BatchNormNumbers {
  int64_t groups, count;
  double eps, slope;
};

struct CudaTable {
  uint32_t version, size;

  // Devices and streams: see shim.h.
  int32_t (*device_count)();
  void (*device)(int32_t index, takuma_cuda_device_info *info);
  int32_t (*runtime_version)();
  void (*select)(int32_t index, bool tf32, bool deterministic);
  void *(*stream)();
  void (*synchronize)();
  void *(*event_new)();
  void (*event_record)(void *event);
  bool (*event_query)(void *event);
  void (*event_free)(void *event);
  void *(*graph_begin)(void *former, bool across_threads);
  bool (*graph_is_empty)(void *graph);
  void (*graph_end)(void *graph);
  void (*graph_replay)(void *graph);
  void (*graph_free)(void *graph);

  // Kernels. Shapes, types and devices have been checked; all work goes to the current stream.
  void (*vouch)(const uint32_t *ended, const at::Tensor &stamp, double phases, double phase,
                double ranks, at::Tensor &pair);
  // `ended` and `pair` may be NULL and undefined.
  void (*guard)(const std::vector<at::Tensor> &gradients, const at::Tensor &loss,
                const uint32_t *ended, const at::Tensor &pair, const at::Tensor &frozen, bool sticky,
                at::Tensor &found, at::Tensor &index);
  void (*commit_statistics)(const std::vector<RunningStatistics> &layers, double momentum,
                            const at::Tensor &found);
  void (*gather_images)(const at::Tensor &images, const at::Tensor &rows, at::Tensor &target);

  // By lane x, y, dy, dx, all channels_last, dweight and dbias. Fills y, stats (double [groups, 2, C]) and maps (float
  // or double [groups, 2, C]: scale and shift, which backward wants).
  void (*batch_norm_forward)(const std::vector<at::Tensor> &x, const at::Tensor &weight,
                             const at::Tensor &bias, const BatchNormNumbers &numbers,
                             const BatchSumReducer *reducer, std::vector<at::Tensor> &y,
                             at::Tensor &stats, at::Tensor &maps);
  void (*batch_norm_backward)(const std::vector<at::Tensor> &x, const std::vector<at::Tensor> &dy,
                              const at::Tensor &weight, const at::Tensor &stats,
                              const at::Tensor &maps, const BatchNormNumbers &numbers,
                              const BatchSumReducer *reducer, std::vector<at::Tensor> &dx,
                              std::vector<at::Tensor> &dweight, std::vector<at::Tensor> &dbias);
};

// The installed table, or an exception that says that CUDA is not loaded.
const CudaTable &cuda_table();
