// Batch normalisation over all workers, fused with its activation, as one autograd function.
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>

#include "batch_norm_kernels.h"
#include "cuda/table.h"
#include "guard.h"

namespace {

using at::Tensor;
// A tensor of each lane.
using Tensors = std::vector<Tensor>;

// Holds the Rust closure for as long as a graph node may call it.
struct Reducer : BatchSumReducer {
  explicit Reducer(const takuma_reducer &reducer) : inner(reducer) {}
  Reducer(const Reducer &) = delete;
  Reducer &operator=(const Reducer &) = delete;
  ~Reducer() override { inner.drop(inner.context); }

  // The sum over all workers of `rows`, one of each lane. A single one is summed in its place.
  std::vector<double> sum(std::vector<double> rows, size_t lanes) const {
    if (lanes == 1) {
      check(inner.call(inner.context, rows.data(), rows.size()));
      return rows;
    }
    std::vector<double> sums(rows.size() / lanes);
    check(inner.call_lanes(inner.context, rows.data(), lanes, sums.data(), sums.size()));
    return sums;
  }

  // Of doubles on a GPU: there, if the closure can, else over the host.
  Tensor sum(const Tensor &rows) const override {
    const auto lanes = static_cast<size_t>(rows.size(0));
    if (lanes == 1 && inner.call_on_device) {
      check(inner.call_on_device(inner.context, rows.mutable_data_ptr<double>(),
                                 static_cast<size_t>(rows.numel()), cuda_table().stream()));
      return rows;
    }
    const Tensor host = rows.cpu();
    const double *first = host.const_data_ptr<double>();
    const auto on_host = sum(std::vector<double>(first, first + host.numel()), lanes);
    Tensor sums = rows.select(0, 0);
    sums.copy_(at::from_blob(const_cast<double *>(on_host.data()), sums.sizes(), host.options()));
    return sums;
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

// `rows`, one of each lane, summed over all lanes and workers.
std::vector<double> summed(std::vector<double> rows, size_t lanes, const Options &options) {
  return options.reducer ? options.reducer->sum(std::move(rows), lanes) : rows;
}

template <typename T>
void forward_cpu(const Tensors &x, const Tensor &weight, const Tensor &bias, const Options &options,
                 Tensors &y, Tensor &stats) {
  const int64_t channels = weight.numel(), rows = x[0].numel() / channels / options.groups;
  double *mean_var = stats.mutable_data_ptr<double>();
  std::vector<double> sums;
  for (const Tensor &lane : x) {
    for (int64_t g = 0; g < options.groups; ++g) {
      const T *group = lane.const_data_ptr<T>() + g * rows * channels;
      auto part = chunked_sums(rows, channels, [&](int64_t first, int64_t count, double *into) {
        kernels<T>().moments(group + first * channels, count, channels, into);
      });
      sums.insert(sums.end(), part.begin(), part.end());
    }
  }
  sums = summed(std::move(sums), x.size(), options);
  for (int64_t g = 0; g < options.groups; ++g) {
    double *stat = mean_var + g * 2 * channels;
    const double *sum = sums.data() + g * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = sum[c] / options.count;
      stat[c] = mean;
      stat[channels + c] = std::max(0.0, sum[channels + c] / options.count - mean * mean);
    }
    const auto map = affine<T>(stat, weight, bias, options.eps);
    for (size_t lane = 0; lane < x.size(); ++lane) {
      const T *in = x[lane].const_data_ptr<T>() + g * rows * channels;
      T *out = y[lane].mutable_data_ptr<T>() + g * rows * channels;
      for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t count) {
        kernels<T>().normalize(in + first * channels, out + first * channels, count, channels,
                               map.scale.data(), map.shift.data(), static_cast<T>(options.slope));
      });
    }
  }
}

// One lane's sums of dz and of dz * xhat, [groups, 2, channels], which are its parameters' gradients, too: a
// share, which the bucket exchange sums.
template <typename T>
std::vector<double> gradient_sums_cpu(const Tensor &x, const Tensor &dy, const double *mean_var,
                                      const std::vector<Affine<T>> &maps, const Options &options,
                                      Tensor &dweight, Tensor &dbias) {
  const int64_t channels = dweight.numel(), rows = x.numel() / channels / options.groups;
  const T *in = x.const_data_ptr<T>(), *up = dy.const_data_ptr<T>();
  std::vector<double> sums;
  for (int64_t g = 0; g < options.groups; ++g) {
    const int64_t at = g * rows * channels;
    auto part = chunked_sums(rows, channels, [&](int64_t first, int64_t count, double *into) {
      kernels<T>().gradient_sums(in + at + first * channels, up + at + first * channels, count,
                                 channels, maps[g].scale.data(), maps[g].shift.data(),
                                 static_cast<T>(options.slope), into);
    });
    // From sum dz * x to sum dz * xhat.
    const double *stat = mean_var + g * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      part[channels + c] =
          (part[channels + c] - stat[c] * part[c]) / std::sqrt(stat[channels + c] + options.eps);
    }
    sums.insert(sums.end(), part.begin(), part.end());
  }
  T *dw = dweight.mutable_data_ptr<T>(), *db = dbias.mutable_data_ptr<T>();
  for (int64_t c = 0; c < channels; ++c) {
    double bias_sum = 0, weight_sum = 0;
    for (int64_t g = 0; g < options.groups; ++g) {
      bias_sum += sums[g * 2 * channels + c];
      weight_sum += sums[g * 2 * channels + channels + c];
    }
    db[c] = static_cast<T>(bias_sum);
    dw[c] = static_cast<T>(weight_sum);
  }
  return sums;
}

template <typename T>
void backward_cpu(const Tensors &x, const Tensors &dy, const Tensor &weight, const Tensor &bias,
                  const Tensor &stats, const Options &options, Tensors &dx, Tensors &dweight,
                  Tensors &dbias) {
  const int64_t channels = weight.numel(), rows = x[0].numel() / channels / options.groups;
  const T slope = static_cast<T>(options.slope);
  const double *mean_var = stats.const_data_ptr<double>();
  std::vector<Affine<T>> maps;
  for (int64_t g = 0; g < options.groups; ++g)
    maps.push_back(affine<T>(mean_var + g * 2 * channels, weight, bias, options.eps));
  std::vector<double> sums;
  for (size_t lane = 0; lane < x.size(); ++lane) {
    auto row = gradient_sums_cpu<T>(x[lane], dy[lane], mean_var, maps, options, dweight[lane], dbias[lane]);
    sums.insert(sums.end(), row.begin(), row.end());
  }
  sums = summed(std::move(sums), x.size(), options);
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
    for (size_t lane = 0; lane < x.size(); ++lane) {
      const int64_t at = g * rows * channels;
      const T *in = x[lane].const_data_ptr<T>() + at, *up = dy[lane].const_data_ptr<T>() + at;
      T *out = dx[lane].mutable_data_ptr<T>() + at;
      for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t count) {
        const int64_t offset = first * channels;
        kernels<T>().gradient(in + offset, up + offset, out + offset, count, channels,
                              maps[g].scale.data(), maps[g].shift.data(), slope, by_x.data(),
                              constant.data());
      });
    }
  }
}

// Each lane's in another type, or uninitialised memory like it.
Tensors to(const Tensors &lanes, at::ScalarType type) {
  Tensors out;
  for (const Tensor &lane : lanes) out.push_back(lane.to(type));
  return out;
}
Tensors empty_like(const Tensors &lanes, at::ScalarType type) {
  Tensors out;
  for (const Tensor &lane : lanes) out.push_back(at::empty_like(lane, lane.options().dtype(type)));
  return out;
}
void copy(const Tensors &from, Tensors &to) {
  for (size_t lane = 0; lane < to.size(); ++lane) to[lane].copy_(from[lane]);
}

// Fills y and stats, and on a GPU maps, which backward wants.
void forward_any(const Tensors &x, const Tensor &weight, const Tensor &bias, const Options &options,
                 Tensors &y, Tensor &stats, Tensor &maps) {
  const auto type = x[0].scalar_type();
  if (x[0].is_cuda()) {
    maps = at::empty_like(stats, stats.options().dtype(weight.scalar_type()));
    cuda_table().batch_norm_forward(x, weight, bias, options, options.reducer.get(), y, stats, maps);
  } else if (type == at::kDouble) {
    forward_cpu<double>(x, weight, bias, options, y, stats);
  } else if (type == at::kFloat) {
    forward_cpu<float>(x, weight, bias, options, y, stats);
  } else {
    // For the tests of what runs on GPUs: one rounding, at the end, as there.
    Tensors wide = empty_like(x, at::kFloat);
    forward_cpu<float>(to(x, at::kFloat), weight, bias, options, wide, stats);
    copy(wide, y);
  }
}

void backward_any(const Tensors &x, const Tensors &dy, const Tensor &weight, const Tensor &bias,
                  const Tensor &stats, const Tensor &maps, const Options &options, Tensors &dx,
                  Tensors &dweight, Tensors &dbias) {
  const auto type = x[0].scalar_type();
  if (x[0].is_cuda()) {
    cuda_table().batch_norm_backward(x, dy, weight, stats, maps, options, options.reducer.get(), dx,
                                     dweight, dbias);
  } else if (type == at::kDouble) {
    backward_cpu<double>(x, dy, weight, bias, stats, options, dx, dweight, dbias);
  } else if (type == at::kFloat) {
    backward_cpu<float>(x, dy, weight, bias, stats, options, dx, dweight, dbias);
  } else {
    Tensors wide = empty_like(x, at::kFloat);
    backward_cpu<float>(to(x, at::kFloat), to(dy, at::kFloat), weight, bias, stats, options, wide,
                        dweight, dbias);
    copy(wide, dx);
  }
}

void check_lane(const Tensor &x, const Tensor &weight, const Tensor &bias, const Options &options) {
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

void check_input(at::TensorList x, at::TensorList weights, at::TensorList biases, const Options &options) {
  TORCH_CHECK(!x.empty(), "batch norm wants a lane");
  TORCH_CHECK(x.size() == 1 || options.reducer, "batch norm over several lanes wants a reducer");
  for (size_t lane = 0; lane < x.size(); ++lane) {
    check_lane(x[lane], weights[lane], biases[lane], options);
    TORCH_CHECK(x[lane].sizes() == x[0].sizes() && x[lane].options().type_equal(x[0].options()),
                "all lanes of a batch norm have one shape and type, not ", x[0].sizes(), " and ",
                x[lane].sizes());
    TORCH_CHECK(weights[lane].const_data_ptr() == weights[0].const_data_ptr() &&
                    biases[lane].const_data_ptr() == biases[0].const_data_ptr(),
                "all lanes of a batch norm have their weights in one memory");
  }
}

Tensors channels_last(at::TensorList lanes) {
  Tensors out;
  for (const Tensor &lane : lanes) out.push_back(lane.contiguous(at::MemoryFormat::ChannelsLast));
  return out;
}

// Takes x, then weight, then bias of each lane; gives y of each lane, then the statistics.
class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext *ctx,
                                                at::TensorList x_any, at::TensorList weights,
                                                at::TensorList biases, const Options &options) {
    check_input(x_any, weights, biases, options);
    const Tensors x = channels_last(x_any);
    Tensors y = empty_like(x, x[0].scalar_type());
    Tensor stats =
        at::empty({options.groups, 2, x[0].size(1)}, x[0].options().dtype(at::kDouble));
    Tensor maps;
    forward_any(x, weights[0], biases[0], options, y, stats, maps);
    torch::autograd::variable_list saved = x;
    saved.insert(saved.end(), {weights[0], biases[0], stats, maps});
    ctx->save_for_backward(std::move(saved));
    ctx->mark_non_differentiable({stats});
    ctx->saved_data["groups"] = options.groups;
    ctx->saved_data["count"] = options.count;
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["slope"] = options.slope;
    if (options.reducer) ctx->saved_data["reducer"] = c10::IValue::make_capsule(
        c10::make_intrusive<Holder>(options.reducer));
    y.push_back(stats);
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 torch::autograd::variable_list grads) {
    const size_t lanes = grads.size() - 1;
    const auto saved = ctx->get_saved_variables();
    const Tensors x(saved.begin(), saved.begin() + lanes);
    const Tensor &weight = saved[lanes], &bias = saved[lanes + 1], &stats = saved[lanes + 2];
    Options options{{ctx->saved_data["groups"].toInt(), ctx->saved_data["count"].toInt(),
                     ctx->saved_data["eps"].toDouble(), ctx->saved_data["slope"].toDouble()},
                    {}};
    const auto held = ctx->saved_data.find("reducer");
    if (held != ctx->saved_data.end())
      options.reducer = c10::static_intrusive_pointer_cast<Holder>(held->second.toCapsule())->reducer;
    const Tensors dy = channels_last(at::TensorList(grads).slice(0, lanes));
    Tensors dx = empty_like(x, x[0].scalar_type()), dweight, dbias;
    for (size_t lane = 0; lane < lanes; ++lane) {
      dweight.push_back(at::empty_like(weight));
      dbias.push_back(at::empty_like(bias));
    }
    backward_any(x, dy, weight, bias, stats, saved[lanes + 3], options, dx, dweight, dbias);
    torch::autograd::variable_list out = std::move(dx);
    out.insert(out.end(), dweight.begin(), dweight.end());
    out.insert(out.end(), dbias.begin(), dbias.end());
    out.emplace_back();
    return out;
  }

 private:
  struct Holder : torch::CustomClassHolder {
    explicit Holder(std::shared_ptr<Reducer> r) : reducer(std::move(r)) {}
    std::shared_ptr<Reducer> reducer;
  };
};

}  // namespace

extern "C" char *takuma_batch_norm(const tensor *x, const tensor *weight, const tensor *bias, size_t lanes,
                                   const takuma_batch_norm_options *options, tensor *y,
                                   tensor *stats) {
  return guarded([&] {
    Options inner{{options->groups, options->count, options->eps, options->slope}, {}};
    if (options->reducer) inner.reducer = std::make_shared<Reducer>(*options->reducer);
    const Tensors x_list = list(x, lanes), weights = list(weight, lanes), biases = list(bias, lanes);
    auto out = BatchNorm::apply(at::TensorList(x_list), at::TensorList(weights),
                                at::TensorList(biases), inner);
    for (size_t lane = 0; lane < lanes; ++lane) y[lane] = new Tensor(out[lane]);
    *stats = new Tensor(out[lanes]);
  });
}
