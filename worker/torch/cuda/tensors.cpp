// See tensors.h. Scratch comes from libtorch's allocator as tensors: memory of the stream, or of the graph that is
// being captured.
#include "tensors.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>

#include "modules.h"
#include "plan.h"

namespace takuma_cuda {
namespace {

using at::Tensor;

int type_of(const Tensor &tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return kF32;
    case at::kDouble:
      return kF64;
    case at::kBFloat16:
      return kBf16;
    default:
      TORCH_CHECK(false, "takuma's kernels take float, double and bfloat16, not ", tensor.scalar_type());
  }
}

int narrowed(int64_t size) {
  TORCH_CHECK(size >= 0 && size <= INT32_MAX, "a size of ", size, " is too large for a kernel");
  return static_cast<int>(size);
}

Tensor scratch(const Tensor &like, at::ScalarType type, int64_t len) {
  return at::empty({len}, like.options().dtype(type));
}

Values values_of(const Tensor &tensor) {
  return {tensor.const_data_ptr(), tensor.numel(), type_of(tensor)};
}

// Fills in what forward and backward share.
void describe(NormMemory &norm, const Tensor &x, const Tensor &weight, const Tensor &stats,
              const Tensor &maps, const BatchNormNumbers &numbers) {
  norm.type = type_of(x);
  norm.channels = narrowed(x.size(1));
  norm.groups = narrowed(numbers.groups);
  norm.rows = x.numel() / x.size(1) / numbers.groups;
  norm.count = static_cast<double>(numbers.count);
  norm.eps = numbers.eps;
  norm.slope = numbers.slope;
  norm.x = x.const_data_ptr();
  norm.weight = weight.const_data_ptr();
  norm.stats = const_cast<double *>(stats.const_data_ptr<double>());
  norm.maps = const_cast<void *>(maps.const_data_ptr());
}

// Scratch of a batch normalisation, given to its lanes: partial sums, of which one lane's are needed at a time, and a row
// of sums for each lane.
struct Memory {
  template <typename Norm>
  Memory(std::vector<Norm> &lanes, const Tensor &stats)
      : partial(scratch(stats, at::kDouble, norm_partial_len(lanes[0]))),
        rows(at::empty({static_cast<int64_t>(lanes.size()), stats.size(0), 2, stats.size(2)},
                       stats.options())) {
    for (size_t i = 0; i < lanes.size(); ++i) {
      lanes[i].partial = partial.mutable_data_ptr<double>();
      lanes[i].sums = rows.mutable_data_ptr<double>() + i * stats.numel();
    }
  }

  Tensor partial, rows;
};

// Sums over all lanes and workers, where the first lane finds them. To be kept until they are read.
template <typename Norm>
Tensor summed(const Memory &memory, std::vector<Norm> &lanes, const BatchSumReducer *reducer) {
  if (!reducer) return memory.rows;
  Tensor sums = reducer->sum(memory.rows);
  lanes[0].sums = sums.mutable_data_ptr<double>();
  return sums;
}

}  // namespace

void vouch(const uint32_t *ended, const Tensor &stamp, double phases, double phase, double ranks,
           Tensor &pair) {
  const c10::cuda::CUDAGuard device(pair.device());
  ::vouch(launch_kernel, {ended, pair.mutable_data_ptr<double>()}, stamp.const_data_ptr<double>(), phases,
          phase, ranks);
}

void guard(const std::vector<Tensor> &gradients, const Tensor &loss, const uint32_t *ended,
           const Tensor &pair, const Tensor &frozen, bool sticky, Tensor &found, Tensor &index) {
  const c10::cuda::CUDAGuard device(found.device());
  std::vector<Values> values;
  for (const Tensor &gradient : gradients) values.push_back(values_of(gradient));
  const auto count = static_cast<int64_t>(values.size());
  Tensor minima = scratch(found, at::kInt, std::max<int64_t>(1, scan_minima_len(count)));
  // Of a scalar that only `sticky` and `ended` let change.
  auto *ice = const_cast<float *>(frozen.const_data_ptr<float>());
  ::guard(launch_kernel, values.data(), count, values_of(loss),
          {ended, pair.defined() ? const_cast<double *>(pair.const_data_ptr<double>()) : nullptr}, ice, sticky,
          found.mutable_data_ptr<float>(), index.mutable_data_ptr<int64_t>(),
          minima.mutable_data_ptr<int32_t>());
}

void commit_statistics(const std::vector<RunningStatistics> &layers, double momentum,
                       const Tensor &found) {
  const c10::cuda::CUDAGuard device(layers[0].mean.device());
  std::vector<Layer> plain;
  for (const RunningStatistics &layer : layers)
    plain.push_back({layer.mean.mutable_data_ptr(), layer.variance.mutable_data_ptr(),
                     layer.batch.const_data_ptr<double>(), layer.unbiased, narrowed(layer.mean.numel()),
                     narrowed(layer.batch.size(0)), type_of(layer.mean)});
  ::commit_statistics(launch_kernel, plain.data(), static_cast<int64_t>(plain.size()), momentum,
                      found.defined() ? found.const_data_ptr<float>() : nullptr);
}

void gather_images(const Tensor &images, const Tensor &rows, Tensor &target) {
  const c10::cuda::CUDAGuard device(target.device());
  ::gather_images(launch_kernel, images.const_data_ptr<uint8_t>(), images.size(0),
                  images.size(1) * images.size(2) * 3, rows.const_data_ptr<int64_t>(), rows.numel(),
                  target.mutable_data_ptr(), type_of(target));
}

void batch_norm_forward(const std::vector<Tensor> &x, const Tensor &weight, const Tensor &bias,
                        const BatchNormNumbers &numbers, const BatchSumReducer *reducer,
                        std::vector<Tensor> &y, Tensor &stats, Tensor &maps) {
  const c10::cuda::CUDAGuard device(stats.device());
  std::vector<NormForward> lanes(x.size());
  for (size_t i = 0; i < lanes.size(); ++i) {
    describe(lanes[i], x[i], weight, stats, maps, numbers);
    lanes[i].bias = bias.const_data_ptr();
    lanes[i].y = y[i].mutable_data_ptr();
  }
  const Memory memory(lanes, stats);
  norm_forward_begin(launch_kernel, lanes.data(), lanes.size(), reducer != nullptr);
  const Tensor sums = summed(memory, lanes, reducer);
  norm_forward_end(launch_kernel, lanes.data(), lanes.size(), reducer != nullptr);
}

void batch_norm_backward(const std::vector<Tensor> &x, const std::vector<Tensor> &dy,
                         const Tensor &weight, const Tensor &stats, const Tensor &maps,
                         const BatchNormNumbers &numbers, const BatchSumReducer *reducer,
                         std::vector<Tensor> &dx, std::vector<Tensor> &dweight,
                         std::vector<Tensor> &dbias) {
  const c10::cuda::CUDAGuard device(stats.device());
  Tensor coefficients = at::empty_like(maps);
  std::vector<NormBackward> lanes(x.size());
  for (size_t i = 0; i < lanes.size(); ++i) {
    describe(lanes[i], x[i], weight, stats, maps, numbers);
    lanes[i].dy = dy[i].const_data_ptr();
    lanes[i].dx = dx[i].mutable_data_ptr();
    lanes[i].dweight = dweight[i].mutable_data_ptr();
    lanes[i].dbias = dbias[i].mutable_data_ptr();
    lanes[i].coefficients = coefficients.mutable_data_ptr();
  }
  const Memory memory(lanes, stats);
  norm_backward_begin(launch_kernel, lanes.data(), lanes.size(), reducer != nullptr);
  const Tensor sums = summed(memory, lanes, reducer);
  norm_backward_end(launch_kernel, lanes.data(), lanes.size(), reducer != nullptr);
}

}  // namespace takuma_cuda
