// Which tile a block works on: found on the device from group_sizes, which never travel to the host.
#pragma once

#include "cutlass/fast_math.h"
#include "hopper.cuh"

namespace latent_moe {

// A tile of the output: whose it is, where it begins, and how much of it there is.
struct alignas(32) Work {
  int expert;   // -1: there is no tile
  int row;      // first row of the tile (outer: of the expert)
  int valid;    // rows of the tile that belong to the expert (outer: rows of the expert)
  int out_row;  // outer: first row of the tile within the product
  int column;   // first column of the tile within the product
  int steps;    // steps along the contracted axis; 0 where the product is zero

  static __device__ Work none() { return {-1}; }
};

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// All tiles, in order. Rows beyond the sum of the groups are one more group, whose product is zero.
template <int I>
class Schedule {
  static constexpr Instance kInstance = kInstances[I];
  static constexpr Tile kTile = kInstance.tile;
  static constexpr bool kOuter = kInstance.contraction == Contraction::kOuter;
  static constexpr bool kTurned = is_turned(kInstance);
  // The tile of a gated activation is half gate, half up.
  static constexpr bool kHalves = kInstance.epilogue == Epilogue::kActivation && is_gated(kInstance.activation);
  static constexpr int kColumns = kHalves ? kTile.columns / 2 : kTile.columns;

 public:
  static constexpr int shared_bytes(int num_experts) { return (kOuter ? 1 : 2) * (num_experts + 2) * sizeof(int); }

  // Sums the groups; every thread of the block takes part, and __syncthreads() must follow.
  __device__ Schedule(Args const& args, int* shared)
      : args_(args), starts_(shared), tiles_(shared + args.num_experts + 2) {
    const int columns = ceil_div(args.out_columns, kColumns * kTile.cluster_columns);
    const int rows = kOuter ? ceil_div(args.out_rows, kTile.rows * kTile.cluster_rows) : 1;
    by_column_ = cutlass::FastDivmod(columns);
    by_expert_ = cutlass::FastDivmod(rows * columns);
    for (int expert = threadIdx.x; expert <= args.num_experts; expert += blockDim.x) {
      starts_[expert] = expert < args.num_experts ? min(max(0, args.group_sizes[expert]), args.num_rows) : args.num_rows;
    }
    __syncthreads();
    if (threadIdx.x < 32) sum(threadIdx.x, columns);
    __syncthreads();
    count_ = kOuter ? args.num_experts * rows * columns : tiles_[args.num_experts + 1];
  }

  __device__ int count() const { return count_; }

  // The tile of a cluster's first block; `expert` is that of another tile, or 0, and becomes this one's.
  __device__ __forceinline__ Work work(int id, int& expert) const {
    Work work = {};
    int local, row, column;
    if constexpr (kOuter) {
      by_expert_(work.expert, local, id);
      by_column_(row, column, local);
      work.out_row = row * kTile.cluster_rows * kTile.rows;
      work.column = column * kTile.cluster_columns * kTile.columns;
      work.row = starts_[work.expert];
      work.valid = starts_[work.expert + 1] - work.row;
      work.steps = ceil_div(work.valid, step_depth(kInstance));
    } else {
      expert = find(id, expert);
      local = id - tiles_[expert];
      const int start = starts_[expert], end = starts_[expert + 1];
      const int row_tiles = ceil_div(end - start, kTile.rows);
      if (args_.rows_first) {
        column = local / row_tiles;
        row = local - column * row_tiles;
      } else {
        by_column_(row, column, local);
      }
      const int height = kTurned ? ceil_div(ceil_div(end - start, row_tiles), 8) * 8 : kTile.rows;
      work.expert = expert;
      work.row = start + row * height;
      work.valid = min(height, end - work.row);
      work.column = column * kTile.cluster_columns * kColumns;
      work.steps = expert == args_.num_experts ? 0 : ceil_div(args_.contracted, kBlock);
    }
    return work;
  }

  // From the tile of a cluster's first block to that of another one.
  static __device__ __forceinline__ void of_block(Work& work, int rank) {
    work.out_row += rank / kTile.cluster_columns * kTile.rows;
    work.column += rank % kTile.cluster_columns * kColumns;
  }

 private:
  // The last group whose first tile is not beyond id, from another one on: mostly a step or two.
  __device__ __forceinline__ int find(int id, int from) const {
    int low = from, high = args_.num_experts;
    if (tiles_[from] > id) {
      for (int step = 1; tiles_[low] > id; step *= 2) {
        high = low - 1;
        low = max(0, low - step);
      }
    } else {
      for (int step = 1; low + step <= high; step *= 2) {
        if (tiles_[low + step] > id) {
          high = low + step - 1;
        } else {
          low += step;
        }
      }
    }
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      tiles_[middle] <= id ? low = middle : high = middle - 1;
    }
    return low;
  }

  // From sizes in starts_ (the last group takes what is left): starts_[e] becomes the first row of expert e, tiles_[e] its
  // first tile. By one warp, of which each lane takes its share of the experts.
  __device__ void sum(int lane, int columns) {
    const int groups = args_.num_experts + 1, share = ceil_div(groups, 32);
    const int first = min(lane * share, groups), last = min(first + share, groups);
    const uint32_t rows = args_.num_rows;
    uint32_t row = 0, tile = 0;
    for (int expert = first; expert < last; ++expert) row = min(row + starts_[expert], rows);
    row = sum_before(row, rows, lane);
    for (int expert = first; expert < last; ++expert) {
      const uint32_t end = min(row + starts_[expert], rows);
      starts_[expert] = row;
      if (!kOuter) {
        tiles_[expert] = tile;
        tile += ceil_div(end - row, kTile.rows) * columns;
      }
      row = end;
    }
    if (lane == 31) starts_[groups] = rows;
    if (kOuter) return;
    const uint32_t before = sum_before(tile, INT32_MAX, lane);
    for (int expert = first; expert < last; ++expert) tiles_[expert] += before;
    if (lane == 31) tiles_[groups] = before + tile;
  }

  // The sum of lower lanes' values, or `most` where it is more; so is each value, at most 2^31.
  static __device__ uint32_t sum_before(uint32_t value, uint32_t most, int lane) {
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, value, offset);
      if (lane >= offset) value = min(value + other, most);
    }
    const uint32_t before = __shfl_up_sync(~0u, value, 1);
    return lane == 0 ? 0 : before;
  }

  Args const& args_;
  int* starts_;
  int* tiles_;
  cutlass::FastDivmod by_column_, by_expert_;
  int count_;
};

}  // namespace latent_moe
