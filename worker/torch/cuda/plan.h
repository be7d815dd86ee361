// Which kernels run, on how many blocks, with which arguments. No libtorch and no CUDA in here: the tests run the same
// plans with kernels that were compiled as C++.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernel_types.h"

struct Launch {
  const char *kernel;  // an extern "C" name in a .cu file
  unsigned grid[3], threads;
  void **arguments;  // their addresses, in the kernel's order
};

// Runs or enqueues a kernel; throws if it cannot.
using Launcher = void (*)(const Launch &launch);

// A batch normalisation in memory: [groups, rows, channels].
struct NormMemory {
  int type;  // of x, y, dy, dx; weight, bias and what is made of them are f64 for f64, else f32
  int64_t rows;
  int channels, groups;
  double count, eps, slope;
  const void *x, *weight;
  double *stats;   // [groups, 2, channels]: mean and biased variance
  void *maps;      // [groups, 2, channels]: scale and shift
  double *sums;    // [groups, 2, channels]: what lanes and workers exchange
  double *partial; // norm_partial_len(..)
};

struct NormForward : NormMemory {
  const void *bias;
  void *y;
};

struct NormBackward : NormMemory {
  const void *dy;
  void *dx, *dweight, *dbias;
  void *coefficients;  // [groups, 2, channels], scratch
};

// Doubles that the partial sums take.
int64_t norm_partial_len(const NormMemory &norm);

// Forward is begin, then an exchange of `sums` over workers if `exchanged`, then end; backward likewise. Over `count`
// lanes of one shape, of which each launch sees one: how many there are changes no sum. They share stats, maps,
// coefficients, partial and the weights; several are always exchanged, each has `sums` of its own at the beginning,
// and at the end the first lane's are those over all lanes and workers.
void norm_forward_begin(Launcher launcher, const NormForward *lanes, size_t count, bool exchanged);
void norm_forward_end(Launcher launcher, const NormForward *lanes, size_t count, bool exchanged);
void norm_backward_begin(Launcher launcher, const NormBackward *lanes, size_t count, bool exchanged);
void norm_backward_end(Launcher launcher, const NormBackward *lanes, size_t count, bool exchanged);

// `count` tensors; minima: scan_minima_len(count) ints of scratch.
struct Values {
  const void *data;
  int64_t elements;
  int type;
};
int64_t scan_minima_len(int64_t count);
// A group's word and stamps; both NULL where there is nobody else. See takuma_vouch.
struct GroupMemory {
  const uint32_t *ended;
  double *pair;
};
void vouch(Launcher launcher, const GroupMemory &group, const double *stamp, double phases,
           double phase, double ranks);
void guard(Launcher launcher, const Values *gradients, int64_t count, const Values &loss,
           const GroupMemory &group, float *frozen, bool sticky, float *found, int64_t *index,
           int *minima);

struct Layer {
  void *mean, *variance;
  const double *batch;
  double unbiased;
  int channels, groups, type;
};
// `found` may be NULL.
void commit_statistics(Launcher launcher, const Layer *layers, int64_t count, double momentum,
                       const float *found);

// `rows` [count] of images [images_count, image_bytes] into target of `type`.
void gather_images(Launcher launcher, const uint8_t *images, int64_t images_count,
                   int64_t image_bytes, const int64_t *rows, int64_t count, void *target, int type);
