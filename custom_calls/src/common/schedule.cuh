// Finds the tile that a block works on, on the device from group_sizes.
#pragma once

#include "common/args.h"
#include "common/device.cuh"
#include "cutlass/fast_math.h"

namespace latent_moe {

// A tile of the output: its expert, its first row and column, and its size.
struct alignas(32) Work {
  int expert;   // -1: there is no tile
  int row;      // first row of the tile (wgrad: of the expert)
  int valid;    // rows of the tile that belong to the expert (wgrad: rows of the expert)
  int out_row;  // wgrad: first row of the tile within the product
  int column;   // first column of the tile within the product
  int steps;    // steps along the contracted axis; 0 where the product is zero

  static __device__ Work none() { return {-1}; }
};

// All tiles, in order. Rows beyond the sum of the groups (padding rows) are one more group, whose product is zero.
//
// Traits has the static constants
//   bool kWgrad: whether each expert has a separate product, contracted over its rows;
//   bool kEvenHeights: whether the tiles of an expert have equal heights, of a multiple of 8 rows, rather than kRows each;
//   int kRows, kColumns: rows and columns of the product in a tile;
//   int kClusterRows, kClusterColumns: tiles that a cluster takes at a time, stacked and side by side;
//   int kStepDepth: elements of the contracted axis in a step.
template <class Traits>
class Schedule {
  static constexpr bool kWgrad = Traits::kWgrad;
  static constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns;
  static constexpr int kClusterRows = Traits::kClusterRows, kClusterColumns = Traits::kClusterColumns;

 public:
  static constexpr int shared_bytes(int num_experts) { return (kWgrad ? 1 : 2) * (num_experts + 2) * sizeof(int); }

  // Sums the groups. Every thread of the block takes part.
  __device__ Schedule(Problem const& problem, int* shared)
      : problem_(problem), starts_(shared), tiles_(shared + problem.num_experts + 2) {
    const int columns = ceil_div(problem.out_columns, kColumns * kClusterColumns);
    const int rows = kWgrad ? ceil_div(problem.out_rows, kRows * kClusterRows) : 1;
    by_column_ = cutlass::FastDivmod(columns);
    by_expert_ = cutlass::FastDivmod(rows * columns);
    for (int expert = threadIdx.x; expert <= problem.num_experts; expert += blockDim.x) {
      starts_[expert] =
          expert < problem.num_experts ? min(max(0, problem.group_sizes[expert]), problem.num_rows) : problem.num_rows;
    }
    __syncthreads();
    if (threadIdx.x < 32) sum(threadIdx.x, columns);
    __syncthreads();
    count_ = kWgrad ? problem.num_experts * rows * columns : tiles_[problem.num_experts + 1];
  }

  __device__ int count() const { return count_; }

  // The tile of a cluster's first block. The search begins at `expert`, another tile's expert or 0, and sets it.
  __device__ __forceinline__ Work work(int id, int& expert) const {
    Work work = {};
    int local, row, column;
    if constexpr (kWgrad) {
      by_expert_(work.expert, local, id);
      by_column_(row, column, local);
      work.out_row = row * kClusterRows * kRows;
      work.column = column * kClusterColumns * kColumns;
      work.row = starts_[work.expert];
      work.valid = starts_[work.expert + 1] - work.row;
      work.steps = ceil_div(work.valid, Traits::kStepDepth);
    } else {
      expert = find(id, expert);
      local = id - tiles_[expert];
      const int start = starts_[expert], end = starts_[expert + 1];
      const int row_tiles = ceil_div(end - start, kRows);
      if (problem_.rows_first) {
        column = local / row_tiles;
        row = local - column * row_tiles;
      } else {
        by_column_(row, column, local);
      }
      const int height = Traits::kEvenHeights ? ceil_div(ceil_div(end - start, row_tiles), 8) * 8 : kRows;
      work.expert = expert;
      work.row = start + row * height;
      work.valid = min(height, end - work.row);
      work.column = column * kClusterColumns * kColumns;
      work.steps = expert == problem_.num_experts ? 0 : ceil_div(problem_.contracted, Traits::kStepDepth);
    }
    return work;
  }

  // Turns the tile of a cluster's first block into the tile of block `rank`.
  static __device__ __forceinline__ void of_block(Work& work, int rank) {
    work.out_row += rank / kClusterColumns * kRows;
    work.column += rank % kClusterColumns * kColumns;
  }

 private:
  // The last group whose first tile is at most `id`. The search begins at another group, mostly a step or two away.
  __device__ __forceinline__ int find(int id, int from) const {
    int low = from, high = problem_.num_experts;
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

  // starts_ holds sizes, and the last group takes the rows that are left: starts_[e] becomes the first row of expert e, and
  // tiles_[e] its first tile. One warp does it, each lane for its share of the experts.
  __device__ void sum(int lane, int columns) {
    const int groups = problem_.num_experts + 1, share = ceil_div(groups, 32);
    const int first = min(lane * share, groups), last = min(first + share, groups);
    const uint32_t rows = problem_.num_rows;
    uint32_t row = 0, tile = 0;
    for (int expert = first; expert < last; ++expert) row = min(row + starts_[expert], rows);
    row = sum_before(row, rows, lane);
    for (int expert = first; expert < last; ++expert) {
      const uint32_t end = min(row + starts_[expert], rows);
      starts_[expert] = row;
      if (!kWgrad) {
        tiles_[expert] = tile;
        tile += ceil_div(end - row, kRows) * columns;
      }
      row = end;
    }
    if (lane == 31) starts_[groups] = rows;
    if (kWgrad) return;
    const uint32_t before = sum_before(tile, INT32_MAX, lane);
    for (int expert = first; expert < last; ++expert) tiles_[expert] += before;
    if (lane == 31) tiles_[groups] = before + tile;
  }

  // The sum of lower lanes' values, at most `most`. Each value is at most `most` too, and that at most 2^31.
  static __device__ uint32_t sum_before(uint32_t value, uint32_t most, int lane) {
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, value, offset);
      if (lane >= offset) value = min(value + other, most);
    }
    const uint32_t before = __shfl_up_sync(~0u, value, 1);
    return lane == 0 ? 0 : before;
  }

  Problem const& problem_;
  int* starts_;
  int* tiles_;
  cutlass::FastDivmod by_column_, by_expert_;
  int count_;
};

}  // namespace latent_moe
