// A thread block takes a tile of 64 rows by 128 columns, and 16 lanes a block of 1 x 128. All loads are issued first, so one
// pass over memory makes both the scales and the codes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "formats/e4m3.cuh"
#include "formats/encode_rows.h"

namespace latent_moe::formats {

constexpr int kLanes = 16, kColumns = kBlock / kLanes;                  // of a block, and of a lane
constexpr int kRowThreads = 256, kRowsOfLane = kTileRows * kLanes / kRowThreads;

// Eight neighbouring elements of a row as they are in memory.
template <class T>
struct Eight {
  uint4 raw[sizeof(T) / 2] = {};

  __device__ __forceinline__ void load(T const* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) raw[i] = __ldcs(reinterpret_cast<uint4 const*>(from) + i);
  }

  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = raw[0]; }

  __device__ __forceinline__ void get(float (&values)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (std::is_same_v<T, float>) {
          values[4 * i + j] = __uint_as_float(words[j]);
        } else if constexpr (std::is_same_v<T, __half>) {
          const float2 pair = __half22float2(reinterpret_cast<__half2 const&>(words[j]));
          values[2 * j] = pair.x, values[2 * j + 1] = pair.y;
        } else {
          values[2 * j] = __uint_as_float(words[j] << 16), values[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
        }
      }
    }
  }

  // Rounds the values to T, which has 16 bits.
  __device__ __forceinline__ void put(float const (&values)[kColumns]) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(values[2 * j], values[2 * j + 1]);
        words[j] = reinterpret_cast<uint32_t const&>(pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * j], values[2 * j + 1]);
        words[j] = reinterpret_cast<uint32_t const&>(pair);
      }
    }
    raw[0] = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

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
      float values[kColumns];
      rows[i].get(values);
      uint32_t largest = 0;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) largest = max(largest, magnitude(values[j]));
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, other));
      largest_of_row = lane == i ? largest : largest_of_row;
    }
    const float scale = scale_of(largest_of_row, kLeastOfRows, to.power_of_two), inverse = __fdiv_rn(1.0f, scale);
    store_column(scale, to.scales);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const float of_row = __shfl_sync(~0u, inverse, threadIdx.x % 32 - lane + i);
      float values[kColumns];
      rows[i].get(values);
      if (!holds(i)) continue;
      *reinterpret_cast<uint2*>(to.codes + at(i)) =
          make_uint2(encode(make_float4(values[0], values[1], values[2], values[3]), of_row),
                     encode(make_float4(values[4], values[5], values[6], values[7]), of_row));
    }
  }

  // Stores a number of each row, which lane i has of row i, so that the rows lie side by side.
  __device__ __forceinline__ void store_column(float of_row, float* columns) const {
    if (lane < kRowsOfLane && row + lane < to.rows) columns[block * to.rows + row + lane] = of_row;
  }
};

// The root of a positive number, 0 for all other numbers. It is a step of Newton's method without branches, on a number that is
// large enough for an exact residual. For every number of 16 bits it is correctly rounded, even if the first root is off by
// three units in the last place.
__device__ __forceinline__ float root_of_positive(float x) {
  const bool small = x < 0x1p-80f;
  const float scaled = small ? x * 0x1p64f : x;
  float inverse;
#ifdef __CUDA_ARCH__
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scaled));
#else
  inverse = 1.0f / sqrtf(scaled);
#endif
  const float near = scaled * inverse;
  float root = fmaf(fmaf(-near, near, scaled), 0.5f * inverse, near);
  root = small ? root * 0x1p-32f : root;
  root = __float_as_uint(x) == 0x7f800000 ? x : root;  // infinity
  return x > 0.0f ? root : 0.0f;
}

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

// The operations and their order are as in jax_latent_moe/activations.py, so that the bits are the same.
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
    float d[kColumns], h[kColumns], sum = 0.0f;
    gradients[i].get(d);
    kept[i].get(h);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      sum += d[j] * h[j];
      d[j] = 2.0f * root_of_positive(h[j]) * (weights[i] * d[j]);
    }
    gradients[i].put(d);
    if (place.holds(i)) gradients[i].store(dpre + place.at(i));
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    sum_of_row = place.lane == i ? sum : sum_of_row;
  }
  place.store_column(sum_of_row, row_weight_sums);
  place.encode_rows(gradients);
}

}  // namespace latent_moe::formats
