// Graphs. See device.h.
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>

#include "device.h"

namespace takuma_cuda {
namespace {

using c10::cuda::CUDAStream;
namespace allocator = c10::cuda::CUDACachingAllocator;

struct Graph {
  at::cuda::CUDAGraph graph;
  at::MempoolId_t pool;
  c10::DeviceIndex device;
  CUDAStream stream;
  bool capturing;
};

Graph &graph_of(void *graph) { return *static_cast<Graph *>(graph); }

cudaStreamCaptureStatus status_of(const CUDAStream &stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_IGNORE_ERROR(cudaStreamIsCapturing(stream.stream(), &status));
  return status;
}

// Ends a capture that went wrong, whatever libtorch has done of that: the stream runs what it is given again, and
// libtorch's allocator hands out other memory than the graph's.
void abandon(Graph &graph) {
  graph.capturing = false;
  if (status_of(graph.stream) == cudaStreamCaptureStatusActive) {
    try {
      // Also tells the random generators that the capture is over.
      graph.graph.capture_end();
      return;
    } catch (const std::exception &) {
      // What it left undone follows.
    }
  }
  if (status_of(graph.stream) != cudaStreamCaptureStatusNone) {
    cudaGraph_t rest = nullptr;
    // An error that says that the capture is invalid, which is known, and ends it.
    C10_CUDA_IGNORE_ERROR(cudaStreamEndCapture(graph.stream.stream(), &rest));
    if (rest) C10_CUDA_IGNORE_ERROR(cudaGraphDestroy(rest));
  }
  try {
    allocator::endAllocateToPool(graph.device, graph.pool);
    // Not reached if libtorch has ended it: the graph then releases the pool itself.
    allocator::releasePool(graph.device, graph.pool);
  } catch (const std::exception &) {
    // Nothing is allocated to the pool any more.
  }
}

}  // namespace

// In one pool the allocator hands out a block again once it was freed, in the order in which the stream was given its
// work. Graphs of one pool are replayed in the order of their capture, and what runs between them (sums) is in that order
// too; so what a graph or a sum writes is read before anything else gets the block, in each replay as in the capture.
void *graph_begin(void *former, bool across_threads) {
  const CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  // What failed before the capture is reported here, and not as a failure of the capture.
  if (!former) c10::cuda::stream_synchronize(stream.stream());
  const auto pool = former ? graph_of(former).pool : at::cuda::graph_pool_handle();
  auto graph = std::unique_ptr<Graph>(new Graph{{}, pool, stream.device_index(), stream, true});
  try {
    // Other threads may use CUDA as they like meanwhile, NCCL's and the ones that load data. Only a relaxed capture
    // can be ended by another thread than began it.
    graph->graph.capture_begin(pool, across_threads ? cudaStreamCaptureModeRelaxed
                                                    : cudaStreamCaptureModeThreadLocal);
  } catch (...) {
    abandon(*graph);
    throw;
  }
  return graph.release();
}

bool graph_is_empty(void *handle) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t captured = nullptr;
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(graph_of(handle).stream.stream(), &status, &id, &captured, nullptr,
                                          nullptr, nullptr));
  TORCH_CHECK(status == cudaStreamCaptureStatusActive, "the stream is not being captured any more");
  size_t nodes = 0;
  C10_CUDA_CHECK(cudaGraphGetNodes(captured, nullptr, &nodes));
  return nodes == 0;
}

void graph_end(void *handle) {
  Graph &graph = graph_of(handle);
  // If it throws, graph_free cleans up.
  graph.graph.capture_end();
  graph.capturing = false;
}

void graph_replay(void *handle) { graph_of(handle).graph.replay(); }

void graph_free(void *handle) {
  const std::unique_ptr<Graph> graph(&graph_of(handle));
  if (graph->capturing) abandon(*graph);
}

}  // namespace takuma_cuda
