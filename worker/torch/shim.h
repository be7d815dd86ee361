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
// `call_lanes` writes into `sums` the sum of `rows`, each `len` doubles of one of this worker's `lanes`, over all lanes
// of all workers.
// `call_on_device` does what `call` does with doubles on the GPU, enqueued on a cudaStream_t; it is NULL where the
// values must go over the host.
// `drop` is called once, when the last graph node that holds the reducer is gone.
typedef struct {
  void *context;
  int (*call)(void *context, double *values, size_t len);
  int (*call_lanes)(void *context, const double *rows, size_t lanes, double *sums, size_t len);
  int (*call_on_device)(void *context, double *values, size_t len, void *stream);
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
  int64_t groups;       // each lane is cut into so many equal parts with statistics of their own
  int64_t count;        // elements per channel and group over all lanes and workers
  double eps;           // added to the variance
  double slope;         // activation after it: 1 none, 0 ReLU, else LeakyReLU's negative slope
  const takuma_reducer *reducer; // NULL: statistics over this worker's batch
} takuma_batch_norm_options;

// Batch normalisation fused with the activation behind it, differentiable once; of `lanes` parts of the batch in tensors
// of their own, with statistics over all of them and all workers. Each lane has gradients of its own and is
// computed as if it were the only one, but for the statistics.
//   x       by lane: [N, C, H, W], float, double or bfloat16; made channels_last if it is not
//   weight  by lane: [C]; bias likewise; of x's type, float for bfloat16; all lanes' over the same memory
//   y       given away, by lane: [N, C, H, W], channels_last
//   stats   given away: double [groups, 2, C], mean and biased variance
// Several lanes need a reducer.
// Source: Ioffe and Szegedy 2015, section 3; PyTorch's BatchNorm2d and SyncBatchNorm in training.
char *takuma_batch_norm(const tensor *x, const tensor *weight, const tensor *bias, size_t lanes,
                        const takuma_batch_norm_options *options, tensor *y, tensor *stats);

// x where x > 0, else slope * x; any shape, differentiable.
//   y       given away: as x
// PyTorch: torch.nn.functional.leaky_relu.
char *takuma_leaky_relu(tensor x, double slope, tensor *y);

// Writes to `found` the index of the first tensor with an infinite value or a NaN, or `n` if there is
// none. Float, double or bfloat16 tensors without gaps in memory, all on one device.
char *takuma_first_not_finite(const tensor *tensors, size_t n, size_t *found);

// What this rank says of a group's sums before this moment: pair[0] = stamp * phases + phase, or 0 if *ended is
// not 0 by then; pair[1] = ranks * (stamp * phases + phase).
//   ended       a word that the device can read, for as long as it has work
//   stamp       a double scalar;  pair   double [2], on the same device
char *takuma_vouch(const uint32_t *ended, tensor stamp, double phases, double phase, double ranks,
                   tensor pair);

// Judges an update on the device. *frozen = 2 if *ended is not 0, or pair[0] is not pair[1]. Then *found = 1 if
// `loss` or a gradient is infinite or a NaN or if *frozen is not 0, else 0; *index = the first such gradient or
// n; if `sticky` and *frozen is 0, *frozen = *found.
//   gradients   as in takuma_first_not_finite
//   loss        a scalar of those types
//   ended, pair as in takuma_vouch, pair[0] summed over the ranks since; or both NULL
//   frozen, found   float scalars;  index   an int64 scalar
char *takuma_guard(const tensor *gradients, size_t n, tensor loss, const uint32_t *ended, tensor pair,
                   tensor frozen, int sticky, tensor found, tensor index);

// One Adam step over all parameters in one call. `steps` are float scalars and count up here.
// Where `found_inf`, a float scalar or NULL, is 1, nothing is updated and nothing is counted.
// PyTorch: torch.optim.Adam(fused=True), at::_fused_adam_.
char *takuma_fused_adam(const tensor *params, const tensor *grads, const tensor *exp_avgs,
                        const tensor *exp_avg_sqs, const tensor *steps, size_t n, tensor found_inf,
                        double lr, double beta1, double beta2, double eps);

// Mixes batch statistics into running ones, layer by layer and in each group after group, in place:
// running = running * (1 - momentum) + new * momentum, in double, rounded to the running type after each group.
// The new variance is the unbiased one of elements[i] values. Nothing changes where `found`, a float scalar or
// NULL, is 1.
//   means, variances   [C], float or double
//   batches            double [groups, 2, C], as takuma_batch_norm gave them
// PyTorch: BatchNorm2d.
char *takuma_commit_statistics(const tensor *means, const tensor *variances, const tensor *batches,
                               const double *elements, size_t n, double momentum, tensor found);

// Copies source into target's memory; between pinned memory and the GPU it is only enqueued.
// PyTorch: Tensor.copy_(non_blocking=True).
char *takuma_copy_async(tensor target, tensor source);
// The same for n pairs, in as few launches as can be. PyTorch: torch._foreach_copy_(non_blocking=True).
char *takuma_copy_all(const tensor *targets, const tensor *sources, size_t n);

// Uninitialised memory on the host of `like`'s shape, strides and type; page-locked if `is_pinned`.
//   host    given away
// PyTorch: torch.empty_strided(..., pin_memory=is_pinned).
char *takuma_host_like(tensor like, int32_t is_pinned, tensor *host);

// target[i] = images[rows[i]], each pixel p as p / 127.5 - 1 in float, rounded to target's type.
//   images  uint8 [R, H, W, 3], dense
//   rows    int64 [N]
//   target  [N, 3, H, W], channels_last, float, double or bfloat16
char *takuma_gather_images(tensor images, tensor rows, tensor target);

// CUDA, all of it in a library of its own that is opened at run time. `table` is what that library's
// takuma_cuda_table returned (cuda/table.h). Until it is installed the functions below are errors.
char *takuma_cuda_install(const void *table);

typedef struct {
  char name[256];
  uint64_t memory_bytes;
  int32_t capability[2];
  uint8_t uuid[16];
} takuma_cuda_device_info;

char *takuma_cuda_device_count(int32_t *count);
char *takuma_cuda_device(int32_t index, takuma_cuda_device_info *info);
// 1000 times the major plus 10 times the minor number.
char *takuma_cuda_runtime_version(int32_t *version);

// Makes a GPU and a stream of its pool the calling thread's, and sets the process' switches: whether f32
// factors are rounded to TF32, whether cuDNN must repeat its results (else it measures its algorithms).
// Runs a first kernel, which fails if the GPU is none that libtorch was built for.
char *takuma_cuda_select(int32_t index, int32_t tf32, int32_t deterministic);

// The calling thread's current cudaStream_t.
char *takuma_cuda_stream(void **stream);
char *takuma_cuda_synchronize(void);

// Events without timing, given away. Recorded on the calling thread's stream.
char *takuma_cuda_event_new(void **event);
char *takuma_cuda_event_record(void *event);
char *takuma_cuda_event_query(void *event, int32_t *reached);
void takuma_cuda_event_free(void *event);

// Graphs, given away. From `begin` to `end` the calling thread's stream keeps what it is given instead of
// running it. `free` ends a capture that has not been ended, on the thread that began it.
//   former          NULL, or a graph whose memory the new one shares: it must be replayed after that one, and before
//                   that one is replayed again
//   across_threads  whether another thread may end the capture, on the same stream
char *takuma_cuda_graph_begin(void *former, int32_t across_threads, void **graph);
// Whether nothing was given to the stream since `begin`.
char *takuma_cuda_graph_is_empty(void *graph, int32_t *empty);
char *takuma_cuda_graph_end(void *graph);
char *takuma_cuda_graph_replay(void *graph);
void takuma_cuda_graph_free(void *graph);

#ifdef __cplusplus
}
#endif
