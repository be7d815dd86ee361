// The installed CUDA library, and the C functions that go to it.
#include "shim.h"

#include <atomic>

#include "cuda/table.h"
#include "guard.h"

namespace {
std::atomic<const CudaTable *> installed{nullptr};
}

const CudaTable &cuda_table() {
  const CudaTable *table = installed.load(std::memory_order_acquire);
  TORCH_CHECK(table, "CUDA is not loaded");
  return *table;
}

extern "C" {

char *takuma_cuda_install(const void *given) {
  return guarded([&] {
    const auto *table = static_cast<const CudaTable *>(given);
    TORCH_CHECK(table && table->version == kCudaTableVersion && table->size == sizeof(CudaTable),
                "the CUDA library is of another build");
    installed.store(table, std::memory_order_release);
  });
}

char *takuma_cuda_device_count(int32_t *count) {
  return guarded([&] { *count = cuda_table().device_count(); });
}

char *takuma_cuda_device(int32_t index, takuma_cuda_device_info *info) {
  return guarded([&] { cuda_table().device(index, info); });
}

char *takuma_cuda_runtime_version(int32_t *version) {
  return guarded([&] { *version = cuda_table().runtime_version(); });
}

char *takuma_cuda_select(int32_t index, int32_t tf32, int32_t deterministic) {
  return guarded([&] { cuda_table().select(index, tf32 != 0, deterministic != 0); });
}

char *takuma_cuda_stream(void **stream) {
  return guarded([&] { *stream = cuda_table().stream(); });
}

char *takuma_cuda_synchronize(void) {
  return guarded([&] { cuda_table().synchronize(); });
}

char *takuma_cuda_event_new(void **event) {
  return guarded([&] { *event = cuda_table().event_new(); });
}

char *takuma_cuda_event_record(void *event) {
  return guarded([&] { cuda_table().event_record(event); });
}

char *takuma_cuda_event_query(void *event, int32_t *reached) {
  return guarded([&] { *reached = cuda_table().event_query(event); });
}

void takuma_cuda_event_free(void *event) { cuda_table().event_free(event); }

char *takuma_cuda_graph_begin(void *former, int32_t across_threads, void **graph) {
  return guarded([&] { *graph = cuda_table().graph_begin(former, across_threads != 0); });
}

char *takuma_cuda_graph_is_empty(void *graph, int32_t *empty) {
  return guarded([&] { *empty = cuda_table().graph_is_empty(graph); });
}

char *takuma_cuda_graph_end(void *graph) {
  return guarded([&] { cuda_table().graph_end(graph); });
}

char *takuma_cuda_graph_replay(void *graph) {
  return guarded([&] { cuda_table().graph_replay(graph); });
}

void takuma_cuda_graph_free(void *graph) { cuda_table().graph_free(graph); }

}  // extern "C"
