// The kernels that are compiled: what each multiplies, with which tile, and how it is launched.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "sides.h"

namespace latent_moe {

enum class Type : int32_t { kBf16, kF16 };
enum class Contraction : int32_t { kRowsW, kRowsWt, kOuter };
enum class Epilogue : int32_t { kStore, kActivation, kActivationGrad };
enum class Activation : int32_t { kNone, kRelu2, kGelu, kGeluTanh, kSwiglu, kGeglu, kGegluTanh, kSituGlu };

constexpr bool is_gated(Activation a) { return a >= Activation::kSwiglu; }

// Whether gate and hidden rows are kept, side by side, rather than pre-activations: where hidden rows are a function of the
// gate times the up half, they tell that half, and neither pass need write them beside it.
constexpr bool keeps_gate(Activation a) { return is_gated(a) && a != Activation::kSituGlu; }

// Whether the gradient is made of hidden rows, alone or beside the gate, rather than of pre-activations.
constexpr bool keeps_hidden(Activation a) { return a == Activation::kRelu2 || keeps_gate(a); }

// A tile of `rows` x `columns` is computed by one block; blocks of a cluster share what they load: cluster_rows of them
// lie one above the other, cluster_columns side by side.
struct Tile {
  int32_t rows, columns, stages, cluster_rows, cluster_columns;
};

struct Instance {
  Type type;
  Contraction contraction;
  Epilogue epilogue;
  Activation activation;
  Tile tile;
};

// Whether a tile's rows lie along the axis of wgmma that may be any multiple of 8, rather than along that of 64: then the
// tiles of an expert are of equal height, and hardly higher than its rows. Three blocks of columns gain nothing by it, as
// each reads the rows from shared memory; small tiles are bound by reading weights; of activations, those that gate have
// such an epilogue.
constexpr bool is_turned(Instance const& i) {
  const bool has_epilogue =
      i.epilogue == Epilogue::kStore || (i.epilogue == Epilogue::kActivation && is_gated(i.activation));
  return i.contraction != Contraction::kOuter && has_epilogue && i.tile.rows > 64 && i.tile.columns != 192;
}

// Elements of the contracted axis that a step multiplies. In halves of a stage more of the ring is on its way, which large
// tiles of weight gradients wait for; of smaller tiles half a step would be over before the next is asked for.
constexpr int step_depth(Instance const& i) {
  return i.contraction == Contraction::kOuter && i.tile.rows * i.tile.columns > 128 * 128 ? 32 : 64;
}

#define LATENT_MOE_INSTANCE(type, contraction, epilogue, activation, rows, columns, stages, cluster_rows, \
                            cluster_columns)                                                             \
  Instance{Type::type, Contraction::contraction, Epilogue::epilogue, Activation::activation,               \
           Tile{rows, columns, stages, cluster_rows, cluster_columns}},
constexpr Instance kInstances[] = {
#include LATENT_MOE_INSTANCES
};
#undef LATENT_MOE_INSTANCE
constexpr int kNumInstances = sizeof(kInstances) / sizeof(Instance);

// Where a box of `window_map` stands that holds the rows first ... first + count - 1 (count <= 64), and no others: its
// last row is the last of the map's second axis, so that the copy engine clips it there. The third axis steps through
// rows as the second does, and the fourth, at kAxis, takes kAxis rows off again: its stride is 2^34 bytes less a row's,
// and addresses wrap at 2^64 (Triton's ragged_tma.py moves boxes so).
struct Window {
  static constexpr int32_t kAxis = 1 << 30;
  int32_t y, z;
#ifdef __CUDACC__
  __device__ Window(int first, int count) : y(kAxis - count), z(first + count) {}
#endif
};

// Rows where they stand in a table, perhaps to be weighted: they are gathered into `rows` while the kernel runs.
struct Gather {
  int32_t units;       // of 16 bytes that a row has
  uint4 const* table;  // or none
  int32_t table_rows;
  int32_t const* row_ids;  // row of the table that each row is; beyond the table: its nearest
  float const* weights;  // of each row, or none
  uint4* rows;
  unsigned long long* taken;  // chunks of rows taken from the first and from the last on
  int32_t* ready;             // rows that are there: of all, then of each 64
};

// What one launch works on; all matrices are of 16-bit elements.
struct Args {
  CUtensorMap a, b;
  bool whole_a, whole_b;  // the map's columns are cut into blocks of 64 (tensor_maps.h)
  CUtensorMap boxes;  // outer: the product, in boxes of [16][64]
  void* out;          // else the product; of a fused one the pre-activation, gate and hidden rows, or the gradient
  void* hidden;      // activation: hidden rows [rows, out_columns]; gradient of a kept pre-activation: those weighted
  void const* kept;  // activation gradient: the pre-activation, hidden rows, or these beside the gate
  int32_t const* group_sizes;
  int32_t num_experts, num_rows;
  int32_t contracted;   // length of the contracted axis (rows x w: features; outer: unused, a group's rows)
  int32_t out_rows;     // outer: rows of one product
  int32_t out_columns;  // columns of one product; of a gated activation, of one half
  uint64_t* counter;    // two numbers, the kernel's own: tiles taken from the first and from the last on
  size_t counter_bytes;  // to be cleared: the counter, and those of `gather` behind it
  Gather gather;
  Sides sides;
  bool rows_first;      // walk down the rows of an expert before its columns
  float beta, linear_beta;
  bool keep_pre;             // activation: the pre-activation is stored beside the hidden rows, or gate and hidden rows in one
  float const* row_weights;  // activation gradient: [rows]
  float* partial;            // activation gradient: [column tiles, rows]
};

template <int I>
cudaError_t launch(Args const& args, int num_sms, cudaStream_t stream);

// Experts whose bounds fit beside the stages in a multiprocessor's shared memory.
template <int I>
int max_experts();

}  // namespace latent_moe
