// The library's one function.
#include "device.h"
#include "tensors.h"

extern "C" __attribute__((visibility("default"))) const void *takuma_cuda_table() {
  using namespace takuma_cuda;
  static const CudaTable table = {
      kCudaTableVersion, sizeof(CudaTable), device_count, device, runtime_version, select, stream,
      synchronize, event_new, event_record, event_query, event_free, graph_begin,
      graph_is_empty, graph_end, graph_replay, graph_free, vouch, guard, commit_statistics, gather_images, batch_norm_forward,
      batch_norm_backward,
  };
  return &table;
}
