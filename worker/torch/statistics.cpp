// Running statistics of batch normalisation.
#include "shim.h"

#include "cuda/table.h"
#include "guard.h"

namespace {

void check_layer(const RunningStatistics &layer) {
  const auto type = layer.mean.scalar_type();
  const int64_t channels = layer.mean.numel();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble,
              "running statistics are float or double, not ", type);
  TORCH_CHECK(layer.variance.scalar_type() == type && layer.variance.numel() == channels &&
                  layer.mean.is_contiguous() && layer.variance.is_contiguous(),
              "running mean and variance are dense, of one type and length");
  TORCH_CHECK(layer.batch.dim() == 3 && layer.batch.size(1) == 2 && layer.batch.size(2) == channels &&
                  layer.batch.scalar_type() == at::kDouble && layer.batch.is_contiguous(),
              "batch statistics are double [groups, 2, ", channels, "], not ", layer.batch.sizes());
  TORCH_CHECK(layer.mean.device() == layer.batch.device() &&
                  layer.variance.device() == layer.batch.device(),
              "statistics on two devices");
}

// Each product and sum is rounded: this file is compiled without contraction into fused operations.
template <typename T>
void mix(at::Tensor &running, const double *batch, double scale, double momentum) {
  T *values = running.mutable_data_ptr<T>();
  for (int64_t c = 0; c < running.numel(); ++c) {
    const double fresh = batch[c] * scale;
    values[c] = static_cast<T>(static_cast<double>(values[c]) * (1.0 - momentum) + fresh * momentum);
  }
}

void commit(RunningStatistics &layer, double momentum) {
  const int64_t channels = layer.mean.numel();
  const double *batch = layer.batch.const_data_ptr<double>();
  const bool is_double = layer.mean.scalar_type() == at::kDouble;
  const auto mix_any = is_double ? mix<double> : mix<float>;
  for (int64_t group = 0; group < layer.batch.size(0); ++group, batch += 2 * channels) {
    mix_any(layer.mean, batch, 1.0, momentum);
    mix_any(layer.variance, batch + channels, layer.unbiased, momentum);
  }
}

}  // namespace

extern "C" char *takuma_commit_statistics(const tensor *means, const tensor *variances,
                                          const tensor *batches, const double *elements, size_t n,
                                          double momentum, tensor found) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<RunningStatistics> layers;
    for (size_t i = 0; i < n; ++i) {
      layers.push_back({deref(means[i]), deref(variances[i]), deref(batches[i]),
                        elements[i] / std::max(elements[i] - 1.0, 1.0)});
      check_layer(layers.back());
      TORCH_CHECK(layers.back().mean.device() == layers[0].mean.device(), "layers on two devices");
    }
    if (n == 0) return;
    at::Tensor verdict;
    if (found) {
      verdict = deref(found);
      TORCH_CHECK(verdict.scalar_type() == at::kFloat && verdict.numel() == 1 &&
                      verdict.device() == layers[0].mean.device(),
                  "the verdict is a float scalar on the layers' device");
    }
    if (layers[0].mean.is_cuda()) {
      cuda_table().commit_statistics(layers, momentum, verdict);
      return;
    }
    if (verdict.defined() && *verdict.const_data_ptr<float>() == 1.0f) return;
    for (auto &layer : layers) commit(layer, momentum);
  });
}
