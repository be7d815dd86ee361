// See plan.h.
#include "plan.h"

#include <algorithm>
#include <initializer_list>

namespace {

// Blocks of a pass over all rows. Enough to fill the largest GPU; a number of its own for each GPU would give each its
// own order of sums. Sums want few blocks, as their partial sums are summed up again.
constexpr int64_t kSumBlocks = 512, kMapBlocks = 2048;
// Rows of a thread at least: a block's last steps cost as much as about eight rows.
constexpr int64_t kSumRows = 8, kMapRows = 2;
// What one load of a thread takes.
constexpr int64_t kPackBytes = 16;
// Columns of a block at most: half a kilobyte of neighbouring memory.
constexpr int kTileColumns = 32;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes_of(int type) { return type == kF64 ? 8 : type == kF32 ? 4 : 2; }

bool aligned(std::initializer_list<const void *> pointers, int64_t bytes) {
  for (const void *pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  return true;
}

// Channels of a pack: as many as one load takes, or one where memory does not lie so.
int pack_of(int type, int channels, std::initializer_list<const void *> pointers) {
  const int64_t pack = kPackBytes / bytes_of(type);
  return channels % pack == 0 && aligned(pointers, kPackBytes) ? static_cast<int>(pack) : 1;
}

struct Geometry {
  RowPlan plan;
  unsigned grid[3];
};

Geometry geometry(const NormMemory &norm, int pack, int64_t blocks, int64_t rows_of_thread) {
  const int columns = norm.channels / pack, tile = std::min(columns, kTileColumns);
  int lanes = 1;
  while (lanes * 2 * tile <= kThreads) lanes *= 2;
  const int64_t tiles = divided_up(columns, tile);
  const int64_t row_blocks = std::max<int64_t>(1, blocks / (tiles * norm.groups));
  int64_t rows = std::max(divided_up(norm.rows, row_blocks), lanes * rows_of_thread);
  rows = divided_up(rows, lanes) * lanes;
  const int64_t used = std::max<int64_t>(1, divided_up(norm.rows, rows));
  return {{norm.rows, rows, norm.channels, tile, lanes, static_cast<int>(used)},
          {static_cast<unsigned>(used), static_cast<unsigned>(tiles), static_cast<unsigned>(norm.groups)}};
}

// The kernel's instance for a type and pack.
struct Names {
  const char *f32[2], *f64[2], *bf16[2];
};
#define TAKUMA_NAMES(KERNEL)                                         \
  {                                                                  \
    {KERNEL "_f32_1", KERNEL "_f32_4"},                              \
    {KERNEL "_f64_1", KERNEL "_f64_2"},                              \
    {KERNEL "_bf16_1", KERNEL "_bf16_8"},                            \
  }
constexpr Names kMoments = TAKUMA_NAMES("takuma_moments");
constexpr Names kNormalize = TAKUMA_NAMES("takuma_normalize");
constexpr Names kGradientSums = TAKUMA_NAMES("takuma_gradient_sums");
constexpr Names kGradient = TAKUMA_NAMES("takuma_gradient");
constexpr Names kGather = TAKUMA_NAMES("takuma_gather");

const char *instance(const Names &names, int type, bool packed) {
  return (type == kF64 ? names.f64 : type == kF32 ? names.f32 : names.bf16)[packed];
}

template <typename... Arguments>
void launch(Launcher launcher, const char *kernel, const unsigned (&grid)[3], unsigned threads,
            Arguments &...arguments) {
  void *addresses[] = {const_cast<void *>(static_cast<const void *>(&arguments))...};
  launcher({kernel, {grid[0], grid[1], grid[2]}, threads, addresses});
}

template <typename... Arguments>
void launch_rows(Launcher launcher, const Names &names, int type, int pack, const Geometry &shape,
                 Arguments &...arguments) {
  launch(launcher, instance(names, type, pack != 1), shape.grid, kThreads, arguments...);
}

Geometry sums_geometry(const NormMemory &norm, int pack) {
  return geometry(norm, pack, kSumBlocks, kSumRows);
}

NormPlan finish_plan(const NormMemory &norm, int row_blocks, int mode) {
  return {mode, norm.groups, norm.channels, row_blocks, norm.count, norm.eps};
}

void finish_forward(Launcher launcher, const NormForward &norm, int row_blocks, int mode) {
  const NormPlan plan = finish_plan(norm, row_blocks, mode);
  const unsigned grid[3] = {static_cast<unsigned>(divided_up(norm.channels, kColumns)), 1, 1};
  launch(launcher, norm.type == kF64 ? "takuma_finish_forward_f64" : "takuma_finish_forward_f32",
         grid, kColumns * kLanes, plan, norm.partial, norm.sums, norm.weight, norm.bias, norm.stats,
         norm.maps);
}

void finish_backward(Launcher launcher, const NormBackward &norm, int row_blocks, int mode) {
  const NormPlan plan = finish_plan(norm, row_blocks, mode);
  const unsigned grid[3] = {static_cast<unsigned>(divided_up(norm.channels, kColumns)), 1, 1};
  launch(launcher, norm.type == kF64 ? "takuma_finish_backward_f64" : "takuma_finish_backward_f32",
         grid, kColumns * kLanes, plan, norm.partial, norm.sums, norm.weight, norm.stats,
         norm.dweight, norm.dbias, norm.coefficients);
}

}  // namespace

int64_t norm_partial_len(const NormMemory &norm) {
  // The pack is not known yet: the larger of both.
  const int64_t pack = kPackBytes / bytes_of(norm.type);
  int blocks = sums_geometry(norm, 1).plan.row_blocks;
  if (norm.channels % pack == 0)
    blocks = std::max(blocks, sums_geometry(norm, static_cast<int>(pack)).plan.row_blocks);
  return static_cast<int64_t>(blocks) * norm.groups * 2 * norm.channels;
}

void norm_forward_begin(Launcher launcher, const NormForward *lanes, size_t count, bool exchanged) {
  for (size_t i = 0; i < count; ++i) {
    const NormForward &norm = lanes[i];
    const int pack = pack_of(norm.type, norm.channels, {norm.x});
    const Geometry shape = sums_geometry(norm, pack);
    launch_rows(launcher, kMoments, norm.type, pack, shape, norm.x, shape.plan, norm.partial);
    finish_forward(launcher, norm, shape.plan.row_blocks, exchanged ? kCombine : kCombine | kFinish);
  }
}

void norm_forward_end(Launcher launcher, const NormForward *lanes, size_t count, bool exchanged) {
  if (exchanged) finish_forward(launcher, lanes[0], 0, kFinish);
  for (size_t i = 0; i < count; ++i) {
    const NormForward &norm = lanes[i];
    const int pack = pack_of(norm.type, norm.channels, {norm.x, norm.y});
    const Geometry shape = geometry(norm, pack, kMapBlocks, kMapRows);
    launch_rows(launcher, kNormalize, norm.type, pack, shape, norm.x, norm.y, shape.plan, norm.maps,
                norm.slope);
  }
}

void norm_backward_begin(Launcher launcher, const NormBackward *lanes, size_t count, bool exchanged) {
  for (size_t i = 0; i < count; ++i) {
    const NormBackward &norm = lanes[i];
    const int pack = pack_of(norm.type, norm.channels, {norm.x, norm.dy});
    const Geometry shape = sums_geometry(norm, pack);
    launch_rows(launcher, kGradientSums, norm.type, pack, shape, norm.x, norm.dy, shape.plan, norm.maps,
                norm.slope, norm.partial);
    finish_backward(launcher, norm, shape.plan.row_blocks, exchanged ? kCombine : kCombine | kFinish);
  }
}

void norm_backward_end(Launcher launcher, const NormBackward *lanes, size_t count, bool exchanged) {
  if (exchanged) finish_backward(launcher, lanes[0], 0, kFinish);
  for (size_t i = 0; i < count; ++i) {
    const NormBackward &norm = lanes[i];
    const int pack = pack_of(norm.type, norm.channels, {norm.x, norm.dy, norm.dx});
    const Geometry shape = geometry(norm, pack, kMapBlocks, kMapRows);
    launch_rows(launcher, kGradient, norm.type, pack, shape, norm.x, norm.dy, norm.dx, shape.plan,
                norm.maps, norm.coefficients, norm.slope);
  }
}

int64_t scan_minima_len(int64_t count) { return divided_up(count, kScanEntries) * kScanBlocks; }

void vouch(Launcher launcher, const GroupMemory &group, const double *stamp, double phases,
           double phase, double ranks) {
  const unsigned one[3] = {1, 1, 1};
  launch(launcher, "takuma_vouch", one, kThreads, group.ended, stamp, phases, phase, ranks, group.pair);
}

void guard(Launcher launcher, const Values *gradients, int64_t count, const Values &loss,
           const GroupMemory &group, float *frozen, bool sticky, float *found, int64_t *index,
           int *minima) {
  const unsigned grid[3] = {kScanBlocks, 1, 1}, one[3] = {1, 1, 1};
  int *into = minima;
  for (int64_t first = 0; first < count; first += kScanEntries, into += kScanBlocks) {
    ScanTable table = {};
    table.entries = static_cast<int>(std::min<int64_t>(kScanEntries, count - first));
    table.first_index = static_cast<int>(first);
    table.not_found = static_cast<int>(count);
    for (int i = 0; i < table.entries; ++i) {
      table.data[i] = gradients[first + i].data;
      table.elements[i] = gradients[first + i].elements;
      table.type[i] = gradients[first + i].type;
    }
    launch(launcher, "takuma_scan", grid, kThreads, table, into);
  }
  const int minima_count = static_cast<int>(into - minima), not_found = static_cast<int>(count);
  const int is_sticky = sticky;
  launch(launcher, "takuma_judge", one, kThreads, minima, minima_count, not_found, loss.data, loss.type,
         group.ended, group.pair, frozen, is_sticky, found, index);
}

void commit_statistics(Launcher launcher, const Layer *layers, int64_t count, double momentum,
                       const float *found) {
  for (int64_t first = 0; first < count; first += kLayerEntries) {
    LayerTable table = {};
    const int64_t entries = std::min<int64_t>(kLayerEntries, count - first);
    int widest = 1;
    for (int64_t i = 0; i < entries; ++i) {
      const Layer &layer = layers[first + i];
      table.mean[i] = layer.mean;
      table.variance[i] = layer.variance;
      table.batch[i] = layer.batch;
      table.unbiased[i] = layer.unbiased;
      table.channels[i] = layer.channels;
      table.groups[i] = layer.groups;
      table.type[i] = layer.type;
      widest = std::max(widest, layer.channels);
    }
    table.momentum = momentum;
    const unsigned grid[3] = {static_cast<unsigned>(divided_up(widest, kThreads)),
                              static_cast<unsigned>(entries), 1};
    launch(launcher, "takuma_commit_statistics", grid, kThreads, table, found);
  }
}

void gather_images(Launcher launcher, const uint8_t *images, int64_t images_count,
                   int64_t image_bytes, const int64_t *rows, int64_t count, void *target, int type) {
  // A grid's second side ends there.
  constexpr int64_t kMostImages = 65535;
  if (image_bytes == 0) return;
  const int64_t pack = kPackBytes / bytes_of(type);
  const bool packed = image_bytes % pack == 0 && aligned({images}, pack) && aligned({target}, kPackBytes);
  const int64_t threads = divided_up(image_bytes, packed ? pack : 1);
  for (int64_t first = 0; first < count; first += kMostImages) {
    const unsigned grid[3] = {static_cast<unsigned>(divided_up(threads, kThreads)),
                              static_cast<unsigned>(std::min(kMostImages, count - first)), 1};
    const int64_t *of = rows + first;
    void *into = static_cast<char *>(target) + first * image_bytes * bytes_of(type);
    launch(launcher, instance(kGather, type, packed), grid, kThreads, images, of, into, image_bytes,
           images_count);
  }
}
