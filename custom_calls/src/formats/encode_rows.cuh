// A thread block takes a tile of 64 rows by 128 columns, and 16 lanes a block of 1 x 128. All loads are issued first, so one
// pass over memory makes both the scales and the codes.
#pragma once

#include "formats/e4m3.cuh"
#include "formats/encode_rows.h"
#include "formats/relu2.cuh"

namespace latent_moe::formats {

constexpr int kLanes = kBlock / kColumns;  // of a block
constexpr int kRowThreads = 256, kRowsOfLane = kTileRows * kLanes / kRowThreads;

// A lane's place: kRowsOfLane rows from `row` on, and 8 columns. The last tile and the last block may be partial.
struct Place {
  RowCodes to;
  int64_t row;
  int block, lane, column;

  __device__ explicit Place(RowCodes const& to) : to(to) {
    const int blocks = (to.k + kBlock - 1) / kBlock;
    block = blockIdx.x % blocks;
    row = int64_t(blockIdx.x / blocks) * kTileRows + threadIdx.x / kLanes * kRowsOfLane;
    lane = threadIdx.x % kLanes;
    column = block * kBlock + lane * kColumns;
  }

  __device__ __forceinline__ bool holds(int i) const { return row + i < to.rows && column < to.k; }
  __device__ __forceinline__ int64_t at(int i) const { return (row + i) * to.k + column; }

  // Stores the codes and the scales of the rows. All lanes call it. Lane i divides for row i, because a division is long.
  template <class T>
  __device__ __forceinline__ void encode_rows(Eight<T> const (&rows)[kRowsOfLane]) const {
    uint32_t largest_of_row = 0;
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      uint32_t largest = rows[i].largest();
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, other));
      largest_of_row = lane == i ? largest : largest_of_row;
    }
    const float scale = scale_of(largest_of_row, kLeastOfRows, to.power_of_two), inverse = inverse_of(scale);
    store_column(scale, to.scales);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const float of_row = __shfl_sync(~0u, inverse, threadIdx.x % 32 - lane + i);
      if (holds(i)) rows[i].store_codes(to.codes + at(i), of_row);
    }
  }

  // Stores a number of each row, which lane i has of row i, so that the rows lie side by side.
  __device__ __forceinline__ void store_column(float of_row, float* columns) const {
    if (lane < kRowsOfLane && row + lane < to.rows) columns[block * to.rows + row + lane] = of_row;
  }
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) encode_row_blocks(T const* rows, RowCodes const to) {
  const Place place(to);
  Eight<T> given[kRowsOfLane];
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    if (place.holds(i)) given[i].load(rows + place.at(i));
  }
  place.encode_rows(given);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    relu2_gradient_blocks(T const* dhidden, T const* hidden, float const* row_weights, T* dpre, float* row_weight_sums,
                          RowCodes const to) {
  const Place place(to);
  Eight<T> gradients[kRowsOfLane], kept[kRowsOfLane];
  float weights[kRowsOfLane];
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    weights[i] = place.row + i < to.rows ? row_weights[place.row + i] : 0.0f;
    if (place.holds(i)) gradients[i].load(dhidden + place.at(i)), kept[i].load(hidden + place.at(i));
  }
  float sum_of_row = 0.0f;
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    float sum = differentiate_relu2(gradients[i], kept[i], weights[i]);
    if (place.holds(i)) gradients[i].store(dpre + place.at(i));
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    sum_of_row = place.lane == i ? sum : sum_of_row;
  }
  place.store_column(sum_of_row, row_weight_sums);
  place.encode_rows(gradients);
}

}  // namespace latent_moe::formats
