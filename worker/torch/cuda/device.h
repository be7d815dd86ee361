// Devices, streams, events and graphs: the other half of table.h's CudaTable. See shim.h.
#pragma once
#include "table.h"

namespace takuma_cuda {

int32_t device_count();
void device(int32_t index, takuma_cuda_device_info *info);
int32_t runtime_version();
void select(int32_t index, bool tf32, bool deterministic);
void *stream();
void synchronize();
void *event_new();
void event_record(void *event);
bool event_query(void *event);
void event_free(void *event);
void *graph_begin(void *former, bool across_threads);
bool graph_is_empty(void *graph);
void graph_end(void *graph);
void graph_replay(void *graph);
void graph_free(void *graph);

}  // namespace takuma_cuda
