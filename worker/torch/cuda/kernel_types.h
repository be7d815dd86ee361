// What the kernels (*.cu) and the host that launches them agree on. Plain types only: it goes to NVRTC as it is, in
// front of the kernels, where there is no header to include.
#ifndef TAKUMA_KERNEL_TYPES_H
#define TAKUMA_KERNEL_TYPES_H

// Threads of a block that walks over rows or over memory.
enum { kThreads = 256 };
// Blocks of the scan for values that are not finite.
enum { kScanBlocks = 256 };
// Columns and lanes of a block that sums up partial sums.
enum { kColumns = 32, kLanes = 16 };
// Entries of the tables that kernels get by value; a launch takes 4 KiB of arguments.
enum { kScanEntries = 48, kLayerEntries = 24 };

// Why nothing is applied any more.
enum Frozen { kNotFinite = 1, kEnded = 2 };

enum NumberType { kF32 = 0, kF64 = 1, kBf16 = 2 };

// How [rows, channels] values of one group are dealt to blocks and threads. A block has `tile` columns, each a pack
// of neighbouring channels, and `lanes` rows at a time (a power of two). Grid: row blocks, column tiles, groups.
struct RowPlan {
  long long rows, rows_per_block;
  int channels, tile, lanes, row_blocks;
};

// What batch normalisation's small kernels do: sum up the partial sums (else read `sums`), and make the numbers that
// the next large kernel wants (else write `sums`, for the workers' exchange).
enum { kCombine = 1, kFinish = 2 };

struct NormPlan {
  int mode, groups, channels, row_blocks;
  double count, eps;
};

struct ScanTable {
  const void *data[kScanEntries];
  long long elements[kScanEntries];
  int type[kScanEntries];
  int entries, first_index, not_found;
};

struct LayerTable {
  void *mean[kLayerEntries], *variance[kLayerEntries];
  const double *batch[kLayerEntries];
  double unbiased[kLayerEntries];
  int channels[kLayerEntries], groups[kLayerEntries], type[kLayerEntries];
  double momentum;
};

#endif
