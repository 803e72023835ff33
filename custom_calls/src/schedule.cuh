// Which tile a block works on: found on the device from group_sizes, which never travel to the host.
#pragma once

#include "cutlass/fast_math.h"
#include "hopper.cuh"

namespace latent_moe {

// A tile of the output: whose it is, where it begins, and how much of it there is.
struct Work {
  int expert;
  int row;      // first row of the tile (outer: of the expert)
  int valid;    // rows of the tile that belong to the expert (outer: rows of the expert)
  int out_row;  // outer: first row of the tile within the product
  int column;   // first column of the tile within the product
  int steps;    // 64-wide steps along the contracted axis; 0 where the product is zero
};

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// All tiles, in order. Rows beyond the sum of the groups are one more group, whose product is zero.
template <int I>
class Schedule {
  static constexpr Instance kInstance = kInstances[I];
  static constexpr Tile kTile = kInstance.tile;
  static constexpr bool kOuter = kInstance.contraction == Contraction::kOuter;
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
    if (threadIdx.x < 32) sum(threadIdx.x, columns);
    __syncthreads();
    count_ = kOuter ? args.num_experts * rows * columns : tiles_[args.num_experts + 1];
  }

  __device__ int count() const { return count_; }

  // The tile of this block in its cluster; `expert` is that of another tile, or 0, and becomes this one's.
  __device__ __forceinline__ Work work(int id, int rank, int& expert) const {
    const int rank_row = rank / kTile.cluster_columns, rank_column = rank % kTile.cluster_columns;
    Work work;
    int local, row, column;
    if constexpr (kOuter) {
      by_expert_(work.expert, local, id);
      by_column_(row, column, local);
      work.out_row = (row * kTile.cluster_rows + rank_row) * kTile.rows;
      work.column = (column * kTile.cluster_columns + rank_column) * kTile.columns;
      work.row = starts_[work.expert];
      work.valid = starts_[work.expert + 1] - work.row;
      work.steps = ceil_div(work.valid, kBlock);
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
      // The rows of shared tiles may be any multiple of 8: those of an expert are of equal height.
      const int height = is_shared(kTile) ? ceil_div(ceil_div(end - start, row_tiles), 8) * 8 : kTile.rows;
      work.expert = expert;
      work.row = start + row * height;
      work.valid = min(height, end - work.row);
      work.column = (column * kTile.cluster_columns + rank_column) * kColumns;
      work.steps = expert == args_.num_experts ? 0 : ceil_div(args_.contracted, kBlock);
    }
    return work;
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

  // starts_[e] is the first row of expert e, tiles_[e] its first tile; one warp, 32 experts at a time.
  __device__ void sum(int lane, int columns) {
    int row = 0, tile = 0;
    for (int base = 0; base <= args_.num_experts; base += 32) {
      const int expert = base + lane;
      int size = expert < args_.num_experts ? max(0, args_.group_sizes[expert]) : 0;
      int end = row + inclusive_sum(size, lane);
      const int start = min(end - size, args_.num_rows);
      end = min(end, args_.num_rows);
      if (expert == args_.num_experts) end = args_.num_rows;
      const int tiles = kOuter ? 0 : ceil_div(end - start, kTile.rows) * columns;
      const int last = tile + inclusive_sum(tiles, lane);
      if (expert <= args_.num_experts) {
        starts_[expert] = start;
        if (!kOuter) tiles_[expert] = last - tiles;
        if (expert == args_.num_experts) {
          starts_[expert + 1] = end;
          if (!kOuter) tiles_[expert + 1] = last;
        }
      }
      row = __shfl_sync(~0u, end, 31);
      tile = __shfl_sync(~0u, last, 31);
    }
  }

  static __device__ int inclusive_sum(int value, int lane) {
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, value, offset);
      if (lane >= offset) value += other;
    }
    return value;
  }

  Args const& args_;
  int* starts_;
  int* tiles_;
  cutlass::FastDivmod by_column_, by_expert_;
  int count_;
};

}  // namespace latent_moe
