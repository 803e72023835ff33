// The kernel of both products. A block has a tile of columns of one assignment's expert, and a part of the contracted axis. The
// block of an expert's first assignment multiplies the rows of all its assignments. The blocks of the others end at once.
//
// Sums have a fixed order: weighted parts of the second product are stored, and the last block of a token's tile adds them up.
//
// The second product is launched when all blocks of the first have begun, and an up-projection when those of the second have.
// Until such a kernel waits for the end of the one before, it may only read what no kernel of the call writes.
#pragma once

#include "decode/activation.cuh"
#include "decode/coded.cuh"
#include "decode/dense.cuh"

namespace latent_moe::decode {

constexpr int kWarps = kThreads / 32;

// Fills `list` with the assignments of an expert, in order, and `weights` with their weights in the second product. Returns
// their number. Every thread calls it.
__device__ inline int assignments_of(Product const& product, int expert, uint8_t* list, float* weights) {
  __shared__ uint32_t masks[kWarps];
  const int mine = threadIdx.x, lane = mine % 32, warp = mine / 32;
  const bool exists = mine < product.assignments, has = exists && product.ids[mine] == expert;
  const float weight = exists && product.choice_weights != nullptr ? product.choice_weights[mine] : 0.0f;
  const uint32_t mask = __ballot_sync(~0u, has);
  if (lane == 0) masks[warp] = mask;
  __syncthreads();
  int rank = __popc(mask & ((1u << lane) - 1)), count = 0;
  for (int w = 0; w < kWarps; ++w) {
    rank += w < warp ? __popc(masks[w]) : 0;
    count += __popc(masks[w]);
  }
  if (has) list[rank] = mine, weights[rank] = weight;
  __syncthreads();
  return count;
}

template <class T>
__device__ void store_hidden(Product const& product, int tile, uint8_t const* list, int rows, float const (*sums)[kTile]) {
  Weight const& weight = product.weight;
  const int width = kTile / weight.parts;
  for (int i = threadIdx.x; i < rows * width; i += kThreads) {
    const int row = i / width, column = i % width, feature = tile * width + column;
    if (feature >= weight.n) continue;
    float value = of_gate(product.activation, sums[row][column], product.beta);
    if (weight.parts == 2) value *= of_up(product.activation, sums[row][width + column], product.linear_beta);
    static_cast<T*>(product.hidden)[int64_t{list[row]} * weight.n + feature] = static_cast<T>(value);
  }
}

__device__ inline void store_partial(Product const& product, int tile, uint8_t const* list, float const* weights, int rows,
                                     float const (*sums)[kTile]) {
  const int n = product.weight.n;
  for (int i = threadIdx.x; i < rows * kTile; i += kThreads) {
    const int row = i / kTile, feature = tile * kTile + i % kTile;
    const int64_t part = int64_t{list[row]} * product.splits + blockIdx.z;
    if (feature < n) product.partial[part * n + feature] = weights[row] * sums[row][i % kTile];
  }
}

// The sum of what is stored for a token. Each warp adds every kWarps-th part, and the sums of warps are added in order.
template <class T>
__device__ void combine(Product const& product, int tile, int token) {
  constexpr int kAtOnce = 8;  // parts that are loaded before they are added
  __shared__ float sums[kWarps][kTile];
  const int n = product.weight.n, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int feature = tile * kTile + lane * 4, parts = product.choices * product.splits;
  float const* from = product.partial + int64_t{token} * parts * n + feature;
  float total[4] = {};
  for (int first = feature < n ? warp : parts; first < parts; first += kAtOnce * kWarps) {
    float4 loaded[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int part = first + i * kWarps;
      if (part < parts) loaded[i] = __ldcg(reinterpret_cast<float4 const*>(from + int64_t{part} * n));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      total[0] += loaded[i].x, total[1] += loaded[i].y, total[2] += loaded[i].z, total[3] += loaded[i].w;
    }
  }
  for (int i = 0; i < 4; ++i) sums[warp][lane * 4 + i] = total[i];
  __syncthreads();
  const int column = threadIdx.x;
  if (column < kTile && tile * kTile + column < n) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += sums[w][column];
    static_cast<T*>(product.out)[int64_t{token} * n + tile * kTile + column] = static_cast<T>(sum);
  }
  __syncthreads();
}

template <class T, class Weights>
__global__ void __launch_bounds__(kThreads, Weights::kBlocks) multiply_experts(Product product) {
  __shared__ uint8_t list[kThreads];
  __shared__ float weights[kThreads];
  __shared__ typename Weights::Shared shared;
  __shared__ float sums[Weights::kRows][kTile];
  __shared__ bool last_of[kThreads];
  const int tile = blockIdx.x, assignment = blockIdx.y, id = product.ids[assignment];
  const bool first_product = product.choice_weights == nullptr;
  cudaTriggerProgrammaticLaunchCompletion();
  if (first_product && blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < product.num_counters; i += kThreads) product.counters[i] = 0;
  }
  int count = assignments_of(product, id, list, weights);
  const bool exists = id >= 0 && id < product.experts;
  if (exists && list[0] != assignment) return;  // another block has them
  if (exists) {
    const int depths = ceil_div(product.weight.k, kDepth), depth = ceil_div(depths, gridDim.z) * kDepth;
    const int from = blockIdx.z * depth, to = min(from + depth, product.weight.k);
    // With more tokens, loads keep the memory busy, and asking ahead makes them slower.
    if (product.assignments == product.choices) Weights::prefetch_start(product.weight, id, tile, from, to);
    cudaGridDependencySynchronize();  // the rows of the second product are there
    for (int done = 0; done < count; done += Weights::kRows) {
      const int rows = min(count - done, Weights::kRows);
      Weights::multiply(product, shared, id, tile, from, to, list + done, rows, sums);
      __syncthreads();
      if (first_product) {
        store_hidden<T>(product, tile, list + done, rows, sums);
      } else {
        store_partial(product, tile, list + done, weights + done, rows, sums);
      }
      __syncthreads();
    }
  } else {
    // Such an assignment adds 0.
    if (threadIdx.x == 0) list[0] = assignment, weights[0] = 0.0f;
    for (int i = threadIdx.x; i < kTile; i += kThreads) sums[0][i] = 0.0f;
    count = 1;
    __syncthreads();
    cudaGridDependencySynchronize();
    if (!first_product) store_partial(product, tile, list, weights, 1, sums);
  }
  if (first_product) return;
  // Each assignment arrives once for each part of the contracted axis, by the block that has it.
  __threadfence();
  __syncthreads();
  if (threadIdx.x < count) {
    const int token = list[threadIdx.x] / product.choices;
    last_of[threadIdx.x] =
        atomicAdd(product.counters + token * gridDim.x + tile, 1) == product.choices * int(gridDim.z) - 1;
  }
  __syncthreads();
  __threadfence();
  for (int i = 0; i < count; ++i) {
    if (last_of[i]) combine<T>(product, tile, list[i] / product.choices);
  }
}

// Calls launch(kernel, grid) with the kernel of a product.
template <class Launch>
cudaError_t launch_kernel(Product const& product, Launch launch) {
  const int columns = product.weight.n * product.weight.parts, tiles = ceil_div(columns, kTile);
  const dim3 grid(tiles, product.assignments, product.choice_weights == nullptr ? 1 : product.splits);
  const bool one_token = product.assignments == product.choices, is_half = product.format == Format::kF16;
  switch (product.weight.code) {
    case Code::kDense:
      if (is_half && one_token) return launch(multiply_experts<__half, Dense<__half, 1>>, grid);
      if (is_half) return launch(multiply_experts<__half, Dense<__half, 4>>, grid);
      if (one_token) return launch(multiply_experts<__nv_bfloat16, Dense<__nv_bfloat16, 1>>, grid);
      return launch(multiply_experts<__nv_bfloat16, Dense<__nv_bfloat16, 4>>, grid);
    case Code::kE4m3:
      return launch(multiply_experts<__nv_bfloat16, Coded<Code::kE4m3>>, grid);
    case Code::kInt8:
      return launch(multiply_experts<__nv_bfloat16, Coded<Code::kInt8>>, grid);
    case Code::kMxfp4:
      return launch(multiply_experts<__nv_bfloat16, Coded<Code::kMxfp4>>, grid);
    case Code::kNvfp4:
      return launch(multiply_experts<__nv_bfloat16, Coded<Code::kNvfp4>>, grid);
    case Code::kInt4:
      return launch(multiply_experts<__nv_bfloat16, Coded<Code::kInt4>>, grid);
  }
  return cudaErrorInvalidValue;
}

}  // namespace latent_moe::decode
