// What takuma needs of libtorch and tch does not offer, as plain C functions.
//
// Conventions: a `tensor` is a borrowed `at::Tensor*` (what tch's `Tensor::as_ptr` returns) unless a
// function says that it gives one away. Every fallible function returns NULL, or an error message
// that the caller frees with takuma_free_error. No C++ exception crosses this border.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void *tensor;

// A Rust closure that sums `len` doubles over all workers, in place. `call` returns 0 on success.
// `drop` is called once, when the last graph node that holds the reducer is gone.
typedef struct {
  void *context;
  int (*call)(void *context, double *values, size_t len);
  void (*drop)(void *context);
} takuma_reducer;

void takuma_free_error(char *message);

// Denormal floats count as zero from here on, in this thread and in libtorch's pool.
void takuma_flush_denormals(void);

// Accumulates d loss / d inputs[i] into inputs[i].grad, and computes no other gradient.
// PyTorch: torch.autograd.backward(loss, inputs=inputs).
char *takuma_backward(tensor loss, const tensor *inputs, size_t n_inputs);

// Kernels that the calling thread asks for run on it alone, from here on. Other threads keep theirs.
void takuma_compute_on_this_thread_alone(void);

// What a sink did with a gradient: left it with its parameter; copied it, so that it can be freed; failed,
// which ends backward.
enum { TAKUMA_GRADIENT_LEFT = 0, TAKUMA_GRADIENT_TAKEN = 1, TAKUMA_GRADIENT_FAILED = 2 };

// A Rust closure that is given a parameter's finished gradient, borrowed, and returns one of the above.
// `drop` is called once, when the hook's tensor is gone.
typedef struct {
  void *context;
  int (*call)(void *context, size_t index, tensor gradient);
  void (*drop)(void *context);
} takuma_gradient_sink;

// Tells `sink` each time the gradient of `parameter` has been accumulated, on the thread that runs
// backward. One hook a tensor; it stays for the tensor's life.
// PyTorch: Tensor.register_post_accumulate_grad_hook.
char *takuma_set_gradient_hook(tensor parameter, size_t index, takuma_gradient_sink sink);

// Frees the gradients, so that the next backward hands its buffers over instead of adding to them.
// PyTorch: Optimizer.zero_grad(set_to_none=True).
char *takuma_clear_gradients(const tensor *params, size_t n);

typedef struct {
  int64_t groups;       // the batch is cut into so many equal parts with statistics of their own
  int64_t count;        // elements per channel and group over all workers
  double eps;           // added to the variance
  double slope;         // activation after it: 1 none, 0 ReLU, else LeakyReLU's negative slope
  const takuma_reducer *reducer; // NULL: statistics over this worker's batch
} takuma_batch_norm_options;

// Batch normalisation fused with the activation behind it, differentiable once.
//   x       [N, C, H, W], float or double; made channels_last if it is not
//   weight  [C], bias [C]
//   y       given away: [N, C, H, W], channels_last
//   stats   given away: double [groups, 2, C], mean and biased variance over all workers
// Source: Ioffe and Szegedy 2015, section 3; PyTorch's BatchNorm2d and SyncBatchNorm in training.
char *takuma_batch_norm(tensor x, tensor weight, tensor bias,
                        const takuma_batch_norm_options *options, tensor *y, tensor *stats);

// x where x > 0, else slope * x; any shape, differentiable.
//   y       given away: as x
// PyTorch: torch.nn.functional.leaky_relu.
char *takuma_leaky_relu(tensor x, double slope, tensor *y);

// Writes to `found` the index of the first tensor with an infinite value or a NaN, or `n` if there is
// none. Float or double tensors without gaps in memory.
char *takuma_first_not_finite(const tensor *tensors, size_t n, size_t *found);

// One Adam step over all parameters in one call. `steps` are float scalars and count up here.
// PyTorch: torch.optim.Adam(fused=True), at::_fused_adam_.
char *takuma_fused_adam(const tensor *params, const tensor *grads, const tensor *exp_avgs,
                        const tensor *exp_avg_sqs, const tensor *steps, size_t n, double lr,
                        double beta1, double beta2, double eps);

#ifdef __cplusplus
}
#endif
