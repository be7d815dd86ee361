// Batch normalisation over all workers, fused with its activation, as one autograd function.
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>

#include "batch_norm_kernels.h"
#include "cuda/table.h"
#include "guard.h"

namespace {

using at::Tensor;

// Holds the Rust closure for as long as a graph node may call it.
struct Reducer : BatchSumReducer {
  explicit Reducer(const takuma_reducer &reducer) : inner(reducer) {}
  Reducer(const Reducer &) = delete;
  Reducer &operator=(const Reducer &) = delete;
  ~Reducer() override { inner.drop(inner.context); }

  void sum(double *values, size_t len) const {
    check(inner.call(inner.context, values, len));
  }

  // Of doubles on a GPU: there, if the closure can, else over the host.
  void sum(Tensor &sums) const override {
    const auto len = static_cast<size_t>(sums.numel());
    if (inner.call_on_device) {
      check(inner.call_on_device(inner.context, sums.mutable_data_ptr<double>(), len,
                                 cuda_table().stream()));
      return;
    }
    Tensor host = sums.cpu();
    sum(host.mutable_data_ptr<double>(), len);
    sums.copy_(host);
  }

  static void check(int failed) {
    if (failed) throw std::runtime_error("the exchange of batch statistics failed");
  }

  takuma_reducer inner;
};

struct Options : BatchNormNumbers {
  std::shared_ptr<Reducer> reducer;
};

template <typename T>
const BatchNormKernels<T> &kernels();
template <>
const BatchNormKernels<float> &kernels<float>() {
  static const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return fast ? avx2::float_kernels : baseline::float_kernels;
}
template <>
const BatchNormKernels<double> &kernels<double>() {
  static const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return fast ? avx2::double_kernels : baseline::double_kernels;
}

// Chunks are cut by size alone, never by thread count, so sums have one order on every machine.
constexpr int64_t kChunkElements = 32 * 1024;

// Calls body(first_row, rows) for each chunk of `rows` rows, in parallel.
void for_chunks(int64_t rows, int64_t channels,
                const std::function<void(int64_t chunk, int64_t first, int64_t count)> &body) {
  const int64_t per_chunk = std::max<int64_t>(1, kChunkElements / channels);
  const int64_t chunks = (rows + per_chunk - 1) / per_chunk;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * per_chunk;
      body(chunk, first, std::min(per_chunk, rows - first));
    }
  });
}

// [2 * channels] sums over `rows` rows; kernel(first_row, rows, sums) adds one chunk's.
std::vector<double> chunked_sums(
    int64_t rows, int64_t channels,
    const std::function<void(int64_t first, int64_t count, double *sums)> &kernel) {
  const int64_t per_chunk = std::max<int64_t>(1, kChunkElements / channels);
  const int64_t chunks = (rows + per_chunk - 1) / per_chunk;
  std::vector<double> partial(chunks * 2 * channels, 0.0);
  for_chunks(rows, channels, [&](int64_t chunk, int64_t first, int64_t count) {
    kernel(first, count, partial.data() + chunk * 2 * channels);
  });
  std::vector<double> total(2 * channels, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < 2 * channels; ++i) total[i] += partial[chunk * 2 * channels + i];
  return total;
}

template <typename T>
struct Affine {
  std::vector<T> scale, shift;
};

// scale and shift of one group, from its mean and variance.
template <typename T>
Affine<T> affine(const double *stats, const Tensor &weight, const Tensor &bias, double eps) {
  const int64_t channels = weight.numel();
  const T *w = weight.const_data_ptr<T>(), *b = bias.const_data_ptr<T>();
  Affine<T> out{std::vector<T>(channels), std::vector<T>(channels)};
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = w[c] / std::sqrt(stats[channels + c] + eps);
    out.scale[c] = static_cast<T>(scale);
    out.shift[c] = static_cast<T>(b[c] - stats[c] * scale);
  }
  return out;
}

template <typename T>
void forward_cpu(const Tensor &x, const Tensor &weight, const Tensor &bias, const Options &options,
                 Tensor &y, Tensor &stats) {
  const int64_t channels = x.size(1), rows = x.numel() / channels / options.groups;
  const T *in = x.const_data_ptr<T>();
  T *out = y.mutable_data_ptr<T>();
  double *mean_var = stats.mutable_data_ptr<double>();
  std::vector<double> sums;
  for (int64_t g = 0; g < options.groups; ++g) {
    const T *group = in + g * rows * channels;
    auto part = chunked_sums(rows, channels, [&](int64_t first, int64_t count, double *into) {
      kernels<T>().moments(group + first * channels, count, channels, into);
    });
    sums.insert(sums.end(), part.begin(), part.end());
  }
  if (options.reducer) options.reducer->sum(sums.data(), sums.size());
  for (int64_t g = 0; g < options.groups; ++g) {
    double *stat = mean_var + g * 2 * channels;
    const double *sum = sums.data() + g * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = sum[c] / options.count;
      stat[c] = mean;
      stat[channels + c] = std::max(0.0, sum[channels + c] / options.count - mean * mean);
    }
    const auto map = affine<T>(stat, weight, bias, options.eps);
    const int64_t at = g * rows * channels;
    for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t count) {
      kernels<T>().normalize(in + at + first * channels, out + at + first * channels, count,
                             channels, map.scale.data(), map.shift.data(),
                             static_cast<T>(options.slope));
    });
  }
}

template <typename T>
void backward_cpu(const Tensor &x, const Tensor &dy, const Tensor &weight, const Tensor &bias,
                  const Tensor &stats, const Options &options, Tensor &dx, Tensor &dweight,
                  Tensor &dbias) {
  const int64_t channels = x.size(1), rows = x.numel() / channels / options.groups;
  const T *in = x.const_data_ptr<T>(), *up = dy.const_data_ptr<T>();
  const T slope = static_cast<T>(options.slope);
  T *out = dx.mutable_data_ptr<T>(), *dw = dweight.mutable_data_ptr<T>(),
    *db = dbias.mutable_data_ptr<T>();
  const double *mean_var = stats.const_data_ptr<double>();
  std::vector<Affine<T>> maps;
  std::vector<double> sums;
  for (int64_t g = 0; g < options.groups; ++g) {
    maps.push_back(affine<T>(mean_var + g * 2 * channels, weight, bias, options.eps));
    const int64_t at = g * rows * channels;
    auto part = chunked_sums(rows, channels, [&](int64_t first, int64_t count, double *into) {
      kernels<T>().gradient_sums(in + at + first * channels, up + at + first * channels, count,
                                 channels, maps[g].scale.data(), maps[g].shift.data(), slope, into);
    });
    // From sum dz * x to sum dz * xhat, which is also the weight's gradient.
    const double *stat = mean_var + g * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      part[channels + c] =
          (part[channels + c] - stat[c] * part[c]) / std::sqrt(stat[channels + c] + options.eps);
    }
    sums.insert(sums.end(), part.begin(), part.end());
  }
  // The parameters' gradients are this worker's share; the bucket exchange sums them.
  for (int64_t c = 0; c < channels; ++c) {
    double bias_sum = 0, weight_sum = 0;
    for (int64_t g = 0; g < options.groups; ++g) {
      bias_sum += sums[g * 2 * channels + c];
      weight_sum += sums[g * 2 * channels + channels + c];
    }
    db[c] = static_cast<T>(bias_sum);
    dw[c] = static_cast<T>(weight_sum);
  }
  if (options.reducer) options.reducer->sum(sums.data(), sums.size());
  std::vector<T> by_x(channels), constant(channels);
  for (int64_t g = 0; g < options.groups; ++g) {
    const double *stat = mean_var + g * 2 * channels, *sum = sums.data() + g * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double inv_std = 1.0 / std::sqrt(stat[channels + c] + options.eps);
      const double scale = weight.const_data_ptr<T>()[c] * inv_std;
      const double slope_of_x = -scale * inv_std * sum[channels + c] / options.count;
      by_x[c] = static_cast<T>(slope_of_x);
      constant[c] = static_cast<T>(-scale * sum[c] / options.count - slope_of_x * stat[c]);
    }
    const int64_t at = g * rows * channels;
    for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t count) {
      const int64_t offset = at + first * channels;
      kernels<T>().gradient(in + offset, up + offset, out + offset, count, channels,
                            maps[g].scale.data(), maps[g].shift.data(), slope, by_x.data(),
                            constant.data());
    });
  }
}

// Fills y and stats, and on a GPU maps, which backward wants.
void forward_any(const Tensor &x, const Tensor &weight, const Tensor &bias, const Options &options,
                 Tensor &y, Tensor &stats, Tensor &maps) {
  if (x.is_cuda()) {
    maps = at::empty_like(stats, stats.options().dtype(weight.scalar_type()));
    cuda_table().batch_norm_forward(x, weight, bias, options, options.reducer.get(), y, stats, maps);
  } else if (x.scalar_type() == at::kDouble) {
    forward_cpu<double>(x, weight, bias, options, y, stats);
  } else if (x.scalar_type() == at::kFloat) {
    forward_cpu<float>(x, weight, bias, options, y, stats);
  } else {
    // For the tests of what runs on GPUs: one rounding, at the end, as there.
    Tensor wide = at::empty_like(x, x.options().dtype(at::kFloat));
    forward_cpu<float>(x.to(at::kFloat), weight, bias, options, wide, stats);
    y.copy_(wide);
  }
}

void backward_any(const Tensor &x, const Tensor &dy, const Tensor &weight, const Tensor &bias,
                  const Tensor &stats, const Tensor &maps, const Options &options, Tensor &dx,
                  Tensor &dweight, Tensor &dbias) {
  if (x.is_cuda()) {
    cuda_table().batch_norm_backward(x, dy, weight, stats, maps, options, options.reducer.get(), dx,
                                     dweight, dbias);
  } else if (x.scalar_type() == at::kDouble) {
    backward_cpu<double>(x, dy, weight, bias, stats, options, dx, dweight, dbias);
  } else if (x.scalar_type() == at::kFloat) {
    backward_cpu<float>(x, dy, weight, bias, stats, options, dx, dweight, dbias);
  } else {
    Tensor wide = at::empty_like(x, x.options().dtype(at::kFloat));
    backward_cpu<float>(x.to(at::kFloat), dy.to(at::kFloat), weight, bias, stats, options, wide,
                        dweight, dbias);
    dx.copy_(wide);
  }
}

void check_input(const Tensor &x, const Tensor &weight, const Tensor &bias, const Options &options) {
  TORCH_CHECK(x.dim() == 4 && x.size(0) % options.groups == 0,
              "batch norm wants [N, C, H, W] with N divisible by ", options.groups, ", not ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16,
              "batch norm is for float, double and bfloat16, not ", type);
  for (const Tensor *parameter : {&weight, &bias}) {
    TORCH_CHECK(parameter->numel() == x.size(1) && parameter->is_contiguous() &&
                    parameter->device() == x.device() &&
                    parameter->scalar_type() == (type == at::kBFloat16 ? at::kFloat : type),
                "batch norm's weight and bias are [", x.size(1), "], dense, on ", x.device(),
                ", of x's type, float for bfloat16");
  }
}

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext *ctx,
                                                const Tensor &x_any, const Tensor &weight,
                                                const Tensor &bias, const Options &options) {
    check_input(x_any, weight, bias, options);
    const Tensor x = x_any.contiguous(at::MemoryFormat::ChannelsLast);
    Tensor y = at::empty_like(x), maps;
    Tensor stats = at::empty({options.groups, 2, x.size(1)}, x.options().dtype(at::kDouble));
    forward_any(x, weight, bias, options, y, stats, maps);
    ctx->save_for_backward({x, weight, bias, stats, maps});
    ctx->mark_non_differentiable({stats});
    ctx->saved_data["groups"] = options.groups;
    ctx->saved_data["count"] = options.count;
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["slope"] = options.slope;
    if (options.reducer) ctx->saved_data["reducer"] = c10::IValue::make_capsule(
        c10::make_intrusive<Holder>(options.reducer));
    return {y, stats};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &stats = saved[3];
    Options options{{ctx->saved_data["groups"].toInt(), ctx->saved_data["count"].toInt(),
                     ctx->saved_data["eps"].toDouble(), ctx->saved_data["slope"].toDouble()},
                    {}};
    const auto held = ctx->saved_data.find("reducer");
    if (held != ctx->saved_data.end())
      options.reducer = c10::static_intrusive_pointer_cast<Holder>(held->second.toCapsule())->reducer;
    const Tensor dy = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
    Tensor dx = at::empty_like(x), dweight = at::empty_like(weight), dbias = at::empty_like(bias);
    backward_any(x, dy, weight, bias, stats, saved[4], options, dx, dweight, dbias);
    return {dx, dweight, dbias, Tensor()};
  }

 private:
  struct Holder : torch::CustomClassHolder {
    explicit Holder(std::shared_ptr<Reducer> r) : reducer(std::move(r)) {}
    std::shared_ptr<Reducer> reducer;
  };
};

}  // namespace

extern "C" char *takuma_batch_norm(tensor x, tensor weight, tensor bias,
                                   const takuma_batch_norm_options *options, tensor *y,
                                   tensor *stats) {
  return guarded([&] {
    Options inner{{options->groups, options->count, options->eps, options->slope}, {}};
    if (options->reducer) inner.reducer = std::make_shared<Reducer>(*options->reducer);
    auto out = BatchNorm::apply(deref(x), deref(weight), deref(bias), inner);
    *y = new Tensor(out[0]);
    *stats = new Tensor(out[1]);
  });
}
