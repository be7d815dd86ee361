// takuma's CUDA kernels on a processor: the text that a GPU would run, compiled as C++, launched by the plans that
// launch it there. Threads of a block are fibers that take turns at each __syncthreads.
//
// Odd blocks run their threads from last to first, so that a barrier that is missing changes results.
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_types.h"
#include "nvrtc.h"
#include "plan.h"

namespace {

struct Index {
  unsigned x, y, z;
};
Index threadIdx, blockIdx, gridDim;

unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, 4);
  return bits;
}

float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// ---- Fibers. A context starts one; from then on it is left and entered by jumps, which need no system call.

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  bool started, done;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t unused;
jmp_buf scheduler;
unsigned current;
void (*body)(void **);
void **body_arguments;

__attribute__((noinline)) void __syncthreads() {
  if (_setjmp(fibers[current]->place) == 0) _longjmp(scheduler, 1);
}

void run_thread() {
  body(body_arguments);
  fibers[current]->done = true;
  _longjmp(scheduler, 1);
}

// Runs a thread up to its next barrier or its end.
__attribute__((noinline)) void enter(Fiber &fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  swapcontext(&unused, &fiber.start);
}

void run_block(unsigned threads, bool backwards) {
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber &fiber = *fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    fiber.started = fiber.done = false;
    makecontext(&fiber.start, run_thread, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned turn = 0; turn < threads; ++turn) {
      const unsigned thread = backwards ? threads - 1 - turn : turn;
      if (fibers[thread]->done) continue;
      current = thread;
      threadIdx = {thread, 0, 0};
      enter(*fibers[thread]);
      any = true;
    }
  }
}

}  // namespace

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#include "numbers.cu"
// The order of build.rs.
#include "batch_norm.cu"
#include "images.cu"
#include "update.cu"

namespace {

template <size_t... I, typename... A>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A *>(arguments[I])...);
}

template <auto kernel, typename... A>
void unpack_as(void (*)(A...), void **arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>());
}

template <auto kernel>
void unpack(void **arguments) {
  unpack_as<kernel>(kernel, arguments);
}

struct Kernel {
  const char *name;
  void (*run)(void **);
  bool has_barriers;
};

#define KERNEL(NAME, BARRIERS) {#NAME, unpack<NAME>, BARRIERS}
#define ROW_KERNELS(NAME)                                                            \
  KERNEL(takuma_moments_##NAME, true), KERNEL(takuma_normalize_##NAME, false),       \
      KERNEL(takuma_gradient_sums_##NAME, true), KERNEL(takuma_gradient_##NAME, false), \
      KERNEL(takuma_gather_##NAME, false)

const Kernel kernels[] = {
    ROW_KERNELS(f32_1),
    ROW_KERNELS(f32_4),
    ROW_KERNELS(f64_1),
    ROW_KERNELS(f64_2),
    ROW_KERNELS(bf16_1),
    ROW_KERNELS(bf16_8),
    KERNEL(takuma_finish_forward_f32, true),
    KERNEL(takuma_finish_forward_f64, true),
    KERNEL(takuma_finish_backward_f32, true),
    KERNEL(takuma_finish_backward_f64, true),
    KERNEL(takuma_scan, true),
    KERNEL(takuma_vouch, false),
    KERNEL(takuma_judge, true),
    KERNEL(takuma_commit_statistics, false),
};

const Kernel &kernel_named(const char *name) {
  for (const Kernel &kernel : kernels)
    if (strcmp(kernel.name, name) == 0) return kernel;
  throw std::runtime_error(std::string("no kernel ") + name);
}

std::string used;

void emulate(const Launch &launch) {
  const Kernel &kernel = kernel_named(launch.kernel);
  used += std::string(launch.kernel) + "\n";
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  body = kernel.run;
  body_arguments = launch.arguments;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        if (kernel.has_barriers) {
          run_block(launch.threads, x % 2 == 1);
          continue;
        }
        for (unsigned thread = 0; thread < launch.threads; ++thread) {
          threadIdx = {thread, 0, 0};
          kernel.run(launch.arguments);
        }
      }
}

}  // namespace

// ---- What the tests call: plain pointers to dense memory, channels_last

extern "C" {

struct EmulatedNorm {
  int64_t type, rows, channels, groups, lanes;
  double count, eps, slope;
  const void *weight, *bias;
  double sum_factor;  // stands for the other workers; 0: no exchange
  void *stats;
  // By lane.
  const void *const *x, *const *dy;
  void *const *y, *const *dx, *const *dweight, *const *dbias;
};

// Forward, then backward.
void emulated_norm(const EmulatedNorm *given) {
  const EmulatedNorm &g = *given;
  const bool exchanged = g.sum_factor != 0;
  const auto lanes = static_cast<size_t>(g.lanes);
  const size_t len = static_cast<size_t>(g.groups * 2 * g.channels);
  std::vector<double> rows(lanes * len), sums(len), maps(len), coefficients(len);
  NormForward forward = {};
  forward.type = static_cast<int>(g.type);
  forward.rows = g.rows;
  forward.channels = static_cast<int>(g.channels);
  forward.groups = static_cast<int>(g.groups);
  forward.count = g.count;
  forward.eps = g.eps;
  forward.slope = g.slope;
  forward.weight = g.weight;
  forward.stats = static_cast<double *>(g.stats);
  forward.maps = maps.data();
  forward.bias = g.bias;
  // A number that a sum would show is behind the end.
  const int64_t partial_len = norm_partial_len(forward);
  std::vector<double> partial(partial_len + 1, 1e300);
  forward.partial = partial.data();
  // Lane after lane, to where the first lane finds it.
  auto exchange = [&](auto &all) {
    if (!exchanged) return;
    for (size_t i = 0; i < len; ++i) {
      sums[i] = rows[i];
      for (size_t lane = 1; lane < lanes; ++lane) sums[i] += rows[lane * len + i];
      sums[i] *= g.sum_factor;
    }
    all[0].sums = sums.data();
  };
  std::vector<NormForward> forwards(lanes, forward);
  for (size_t lane = 0; lane < lanes; ++lane) {
    forwards[lane].sums = rows.data() + lane * len;
    forwards[lane].x = g.x[lane];
    forwards[lane].y = g.y[lane];
  }
  norm_forward_begin(emulate, forwards.data(), lanes, exchanged);
  exchange(forwards);
  norm_forward_end(emulate, forwards.data(), lanes, exchanged);
  std::vector<NormBackward> backwards(lanes);
  for (size_t lane = 0; lane < lanes; ++lane) {
    NormBackward &backward = backwards[lane];
    static_cast<NormMemory &>(backward) = forwards[lane];
    backward.sums = rows.data() + lane * len;
    backward.dy = g.dy[lane];
    backward.dx = g.dx[lane];
    backward.dweight = g.dweight[lane];
    backward.dbias = g.dbias[lane];
    backward.coefficients = coefficients.data();
  }
  norm_backward_begin(emulate, backwards.data(), lanes, exchanged);
  exchange(backwards);
  norm_backward_end(emulate, backwards.data(), lanes, exchanged);
  if (partial[partial_len] != 1e300) abort();
}

struct EmulatedValues {
  const void *data;
  int64_t elements, type;
};

void emulated_vouch(const uint32_t *ended, const double *stamp, double phases, double phase, double ranks,
                    double *pair) {
  vouch(emulate, {ended, pair}, stamp, phases, phase, ranks);
}

void emulated_guard(const EmulatedValues *gradients, int64_t count, const EmulatedValues *loss,
                    const uint32_t *ended, double *pair, float *frozen, int sticky, float *found,
                    int64_t *index) {
  std::vector<Values> values;
  for (int64_t i = 0; i < count; ++i)
    values.push_back({gradients[i].data, gradients[i].elements, static_cast<int>(gradients[i].type)});
  std::vector<int> minima(scan_minima_len(count) + 1);
  guard(emulate, values.data(), count, {loss->data, loss->elements, static_cast<int>(loss->type)},
        {ended, pair}, frozen, sticky != 0, found, index, minima.data());
}

struct EmulatedLayer {
  void *mean, *variance;
  const double *batch;
  double unbiased;
  int64_t channels, groups, type;
};

void emulated_commit(const EmulatedLayer *layers, int64_t count, double momentum, const float *found) {
  std::vector<Layer> plain;
  for (int64_t i = 0; i < count; ++i) {
    const EmulatedLayer &l = layers[i];
    plain.push_back({l.mean, l.variance, l.batch, l.unbiased, static_cast<int>(l.channels),
                     static_cast<int>(l.groups), static_cast<int>(l.type)});
  }
  commit_statistics(emulate, plain.data(), count, momentum, found);
}

void emulated_gather(const uint8_t *images, int64_t images_count, int64_t image_bytes, const int64_t *rows,
                     int64_t count, void *target, int64_t type) {
  gather_images(emulate, images, images_count, image_bytes, rows, count, target, static_cast<int>(type));
}

// Names of the kernels that ran, a line each.
const char *emulated_kernels(void) { return used.c_str(); }

// Whether NVRTC compiles `source` for an architecture. `log` gets its words; 0 yes, 1 no, 2 there is no NVRTC.
int compiled(const char *folder, const char *source, int architecture, char *log, size_t log_bytes) {
  int result = 2;
  std::string words;
  try {
    void *library = open_nvrtc({folder});
    result = 1;
    words = compile_kernels(library, source, architecture).log;
    result = 0;
  } catch (const std::exception &error) {
    words = error.what();
  }
  strncpy(log, words.c_str(), log_bytes - 1);
  return result;
}

}  // extern "C"
