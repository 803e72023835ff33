// A thread block encodes a block of 128 x 128: it reads the weight once and writes both layouts. XLA reads the weight once
// for the scales and once more for the codes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "formats/e4m3.cuh"
#include "formats/encode_blocks.h"

namespace latent_moe::formats {
namespace {

constexpr int kWarp = 32, kWarps = 8, kRows = kBlock / kWarps;  // a warp takes kRows rows, a lane 4 columns of each
constexpr float kLeast = 1e-4f;

__device__ __forceinline__ float4 load(float const* from) { return __ldcs(reinterpret_cast<float4 const*>(from)); }

__device__ __forceinline__ float4 load(__nv_bfloat16 const* from) {
  const uint2 bits = __ldcs(reinterpret_cast<uint2 const*>(from));
  const float2 low = __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(bits.x));
  const float2 high = __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(bits.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float4 load(__half const* from) {
  const uint2 bits = __ldcs(reinterpret_cast<uint2 const*>(from));
  const float2 low = __half22float2(reinterpret_cast<__half2 const&>(bits.x));
  const float2 high = __half22float2(reinterpret_cast<__half2 const&>(bits.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

// Four rows of four bytes become four columns.
__device__ __forceinline__ void transpose(uint32_t const (&rows)[4], uint32_t (&columns)[4]) {
  const uint32_t low_01 = __byte_perm(rows[0], rows[1], 0x5140), low_23 = __byte_perm(rows[2], rows[3], 0x5140);
  const uint32_t high_01 = __byte_perm(rows[0], rows[1], 0x7362), high_23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low_01, low_23, 0x5410);
  columns[1] = __byte_perm(low_01, low_23, 0x7632);
  columns[2] = __byte_perm(high_01, high_23, 0x5410);
  columns[3] = __byte_perm(high_01, high_23, 0x7632);
}

template <class T>
__global__ void __launch_bounds__(kWarp* kWarps, 2)
    encode_block(T const* weight, uint8_t* codes, uint8_t* transposed, float* scales, int64_t k, int64_t n, bool power_of_two) {
  __shared__ uint32_t largest_of[kWarps];
  __shared__ uint4 columns[kBlock][kBlock / 16];  // the codes [n][k], 16 a chunk
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t k_blocks = k / kBlock, n_blocks = n / kBlock, block = blockIdx.x;
  const int64_t matrix = block / (k_blocks * n_blocks), row = block / n_blocks % k_blocks * kBlock,
                column = block % n_blocks * kBlock;
  const int64_t first = (matrix * k + row + warp * kRows) * n + column + 4 * lane;

  float4 values[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) values[i] = load(weight + first + i * n);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float4 four = values[i];
    largest = max(largest, max(max(magnitude(four.x), magnitude(four.y)), max(magnitude(four.z), magnitude(four.w))));
  }
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int other = 0; other < kWarps; ++other) largest = max(largest, largest_of[other]);
  const float scale = scale_of(largest, kLeast, power_of_two), inverse = inverse_of(scale);
  if (threadIdx.x == 0) scales[block] = scale;

  uint32_t own[4][kRows / 4];  // of each of the lane's columns, the codes of kRows rows
#pragma unroll
  for (int i = 0; i < kRows; i += 4) {
    uint32_t rows[4], four[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      rows[j] = encode(values[i + j], inverse);
      *reinterpret_cast<uint32_t*>(codes + first + (i + j) * n) = rows[j];
    }
    transpose(rows, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) own[j][i / 4] = four[j];
  }
  // Chunks change places within a row, so that 8 lanes use all banks once, here and below.
#pragma unroll
  for (int j = 0; j < 4; ++j) columns[4 * lane + j][warp ^ (lane & 7)] = make_uint4(own[j][0], own[j][1], own[j][2], own[j][3]);
  __syncthreads();
  const int chunk = lane % 8;
#pragma unroll
  for (int i = 0; i < kBlock; i += 4 * kWarps) {
    const int from = i + 4 * warp + lane / 8;
    *reinterpret_cast<uint4*>(transposed + (matrix * n + column + from) * k + row + 16 * chunk) =
        columns[from][chunk ^ (from / 4 & 7)];
  }
}

template <class T>
cudaError_t launch(EncodeBlocks const& call, cudaStream_t stream) {
  const int64_t blocks = call.matrices * (call.k / kBlock) * (call.n / kBlock);
  encode_block<<<static_cast<unsigned>(blocks), kWarp * kWarps, 0, stream>>>(
      static_cast<T const*>(call.weight), call.codes, call.transposed, call.scales, call.k, call.n, call.power_of_two);
  return cudaGetLastError();
}

}  // namespace

cudaError_t encode_blocks(EncodeBlocks const& call, cudaStream_t stream) {
  switch (call.source) {
    case Source::kF32:
      return launch<float>(call, stream);
    case Source::kBf16:
      return launch<__nv_bfloat16>(call, stream);
    case Source::kF16:
      return launch<__half>(call, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace latent_moe::formats
