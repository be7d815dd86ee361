// Devices, streams, events. See device.h.
#include "device.h"

#include <ATen/Context.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "modules.h"

namespace takuma_cuda {
namespace {

cudaEvent_t event_of(void *event) { return static_cast<cudaEvent_t>(event); }

void set_numerics(bool tf32, bool deterministic) {
  auto &context = at::globalContext();
  // The older setters, as they set what older and newer getters read.
  context.setAllowTF32CuBLAS(tf32);
  context.setAllowTF32CuDNN(tf32);
  context.setDeterministicCuDNN(deterministic);
  // A measurement may choose otherwise in each process.
  context.setBenchmarkCuDNN(!deterministic);
}

}  // namespace

int32_t device_count() {
  int count = 0;
  C10_CUDA_CHECK(cudaGetDeviceCount(&count));
  return count;
}

void device(int32_t index, takuma_cuda_device_info *info) {
  cudaDeviceProp properties = {};
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  std::memset(info, 0, sizeof *info);
  std::strncpy(info->name, properties.name, sizeof info->name - 1);
  info->memory_bytes = properties.totalGlobalMem;
  info->capability[0] = properties.major;
  info->capability[1] = properties.minor;
  std::memcpy(info->uuid, properties.uuid.bytes, sizeof info->uuid);
}

int32_t runtime_version() {
  int version = 0;
  C10_CUDA_CHECK(cudaRuntimeGetVersion(&version));
  return version;
}

void select(int32_t index, bool tf32, bool deterministic) {
  const auto device = static_cast<c10::DeviceIndex>(index);
  at::globalContext().lazyInitDevice(at::kCUDA);
  // Also where the thread's device is this one already: only this makes its context the thread's.
  c10::cuda::set_device(device, /*force=*/true);
  // The default stream waits for others and cannot be captured.
  if (c10::cuda::getCurrentCUDAStream(device) == c10::cuda::getDefaultCUDAStream(device))
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device));
  set_numerics(tf32, deterministic);
  at::zeros({1}, at::TensorOptions().device(at::kCUDA, device)).add_(1);
  synchronize();
  prepare_kernels();
}

void *stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void synchronize() { c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream().stream()); }

void *event_new() {
  cudaEvent_t event = nullptr;
  C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

void event_record(void *event) {
  C10_CUDA_CHECK(cudaEventRecord(event_of(event), c10::cuda::getCurrentCUDAStream().stream()));
}

bool event_query(void *event) {
  const cudaError_t result = cudaEventQuery(event_of(event));
  if (result == cudaErrorNotReady) {
    // An answer, not an error: libtorch must not find it at its next check.
    C10_CUDA_CLEAR_ERROR();
    return false;
  }
  C10_CUDA_CHECK(result);
  return true;
}

void event_free(void *event) { C10_CUDA_IGNORE_ERROR(cudaEventDestroy(event_of(event))); }

}  // namespace takuma_cuda
