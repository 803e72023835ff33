// The arguments of one launch of a kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/l2_slices.h"
#include "common/weight.h"

namespace latent_moe {

// The coordinates in a `window_map` (tensor_maps.h) of a box with the rows first ... first + count - 1 (count <= 64). The
// box's last row is the last of the map's second axis, so TMA clips the box there and reads zeros beyond. The third axis
// advances by rows, as the second does. The fourth, at kAxis, goes back kAxis rows: its stride is 2^34 bytes less a row's,
// and addresses wrap at 2^64. (Triton's ragged_tma.py does the same.)
struct Window {
  static constexpr int32_t kAxis = 1 << 30;
  int32_t y, z;
#ifdef __CUDACC__
  __device__ Window(int first, int count) : y(kAxis - count), z(first + count) {}
#endif
};

// The sizes of a grouped matmul, and the order of its tiles. Rows are sorted by expert.
struct Problem {
  int32_t const* group_sizes;  // rows of each expert
  int32_t num_experts, num_rows;
  int32_t contracted;   // length of the contracted axis (unused in wgrad, which contracts a group's rows)
  int32_t out_rows;     // wgrad: rows of one product
  int32_t out_columns;  // columns of one product, or of one half if the activation is gated
  bool rows_first;      // walk down the rows of an expert before its columns
};

// Rows of a table, optionally times weights, that are copied to `rows` while the kernel runs.
struct Gather {
  int32_t units;       // pieces of 16 bytes in a row
  uint4 const* table;  // null if nothing is gathered
  int32_t table_rows;
  int32_t const* row_ids;  // the table's row of each row; ids beyond the table mean its first or last row
  float const* weights;    // the factor of each row, or null
  uint4* rows;
  unsigned long long* taken;  // chunks of rows taken from the first and from the last on, as two 32-bit numbers
  int32_t* ready;             // numbers of copied rows: in all, then in each block of kReadyRows
};

constexpr int kReadyRows = 64;

struct Args {
  CUtensorMap a, b;
  bool whole_a, whole_b;  // the map's columns are cut into blocks (tensor_maps.h)
  CUtensorMap boxes;      // wgrad: the product, in boxes
  void* out;              // the product, an activation's residual, or the gradient of the pre-activation
  void* hidden;           // an activation's hidden rows [rows, out_columns]; weighted if a gradient reads kPre
  void const* residual;   // for an activation's gradient: what the forward pass kept
  Problem problem;
  uint8_t* codes;            // hidden rows, or the gradient in `out`, as codes [rows, out_columns]; or null
  float* code_scales;        // [out_columns / kScaleBlock, rows]
  bool power_of_two;         // whether these scales are rounded up to powers of two
  float const* row_scales;     // for codes: [contracted / kScaleBlock, rows]
  float const* weight_scales;  // for codes: [experts, columns / kScaleBlock, contracted / kScaleBlock]
  uint64_t* counter;     // tiles taken from the first and from the last on, as two 32-bit numbers
  size_t counter_bytes;  // bytes to clear: the counter, and the counters of `gather` behind it
  Gather gather;
  L2Slices l2_slices;
  bool keep_residual;        // for an activation: whether `out` is written
  float beta, linear_beta;   // situ_glu's bounds of the gate and of the up half
  float const* row_weights;  // for an activation's gradient: [rows]
  float* partial;            // for an activation's gradient: sums of dhidden * hidden, [column tiles, rows]
  Weight weight;             // of codes that a kernel widens
};

}  // namespace latent_moe
