// The kernel of both products. A block has a tile of columns of one assignment's expert, and a part of the contracted axis. The
// block of an expert's first assignment multiplies the rows of all its assignments. The blocks of the others end at once.
//
// Sums have a fixed order: weighted parts of the second product are stored, and the last block of a token's tile adds them up.
//
// The second product is launched when all blocks of the first have begun and have waited for the choice, so it may read the choice
// at once. An up-projection is launched when all blocks of the second have begun, and the first may still run then. Until such a
// kernel has waited for the end of the previous one, it may read nothing that either product writes, and may write nothing.
#pragma once

#include "decode/activation.cuh"
#include "decode/coded.cuh"
#include "decode/dense.cuh"

namespace latent_moe::decode {

// Fills `list` with the assignments of an expert, in order, and `weights` with their weights in the second product. Returns
// their number. Every thread of so many calls it.
template <int Threads>
__device__ int assignments_of(Product const& product, int expert, uint8_t* list, float* weights) {
  constexpr int kWarps = Threads / 32;
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

template <class T, int Threads, int Tile>
__device__ void store_hidden(Product const& product, int tile, uint8_t const* list, int rows, float const (*sums)[Tile]) {
  Weight const& weight = product.weight;
  const int width = width_of<Tile>(weight);
  for (int i = threadIdx.x; i < rows * width; i += Threads) {
    const int row = weight.parts == 2 ? i / (Tile / 2) : i / Tile, column = i & (width - 1), feature = tile * width + column;
    if (feature >= weight.n) continue;
    float value = of_gate(product.activation, sums[row][column], product.beta);
    if (weight.parts == 2) value *= of_up(product.activation, sums[row][width + column], product.linear_beta);
    static_cast<T*>(product.hidden)[int64_t{list[row]} * weight.n + feature] = static_cast<T>(value);
  }
}

template <int Threads, int Tile>
__device__ void store_partial(Product const& product, int tile, uint8_t const* list, float const* weights, int rows,
                              float const (*sums)[Tile]) {
  const int n = product.weight.n;
  for (int i = threadIdx.x; i < rows * Tile; i += Threads) {
    const int row = i / Tile, feature = tile * Tile + i % Tile;
    const int64_t part = int64_t{list[row]} * product.splits + blockIdx.z;
    if (feature < n) product.partial[part * n + feature] = weights[row] * sums[row][i % Tile];
  }
}

// The sum of what is stored for a token. Each group of threads adds every kGroups-th part for all columns of the tile. The sums of
// groups are added in order.
template <class T, int Threads, int Tile>
__device__ void combine(Product const& product, int tile, int token) {
  constexpr int kAtOnce = 9;  // parts that are loaded before they are added
  constexpr int kAcross = Tile / 4, kGroups = Threads / kAcross;
  __shared__ float sums[kGroups][Tile];
  const int n = product.weight.n, across = threadIdx.x % kAcross * 4, group = threadIdx.x / kAcross;
  const int feature = tile * Tile + across, parts = product.choices * product.splits;
  float const* from = product.partial + int64_t{token} * parts * n + feature;
  float total[4] = {};
  for (int first = feature < n ? group : parts; first < parts; first += kAtOnce * kGroups) {
    float4 loaded[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int part = first + i * kGroups;
      if (part < parts) loaded[i] = __ldcg(reinterpret_cast<float4 const*>(from + int64_t{part} * n));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      total[0] += loaded[i].x, total[1] += loaded[i].y, total[2] += loaded[i].z, total[3] += loaded[i].w;
    }
  }
  for (int i = 0; i < 4; ++i) sums[group][across + i] = total[i];
  __syncthreads();
  const int column = threadIdx.x;
  if (column < Tile && tile * Tile + column < n) {
    float sum = 0.0f;
    for (int g = 0; g < kGroups; ++g) sum += sums[g][column];
    static_cast<T*>(product.out)[int64_t{token} * n + tile * Tile + column] = static_cast<T>(sum);
  }
  __syncthreads();
}

// With Distinct, every assignment has an expert, and no two of them the same one.
template <class T, class Weights, bool Distinct>
__global__ void __launch_bounds__(Weights::kThreads, Weights::kBlocks) multiply_experts(Product product) {
  constexpr int kThreads = Weights::kThreads, kTile = Weights::kTile;
  __shared__ uint8_t list[kThreads];
  __shared__ float weights[kThreads];
  __shared__ typename Weights::Shared shared;
  __shared__ float sums[Weights::kRows][kTile];
  __shared__ bool last_of[kThreads];
  const bool first_product = product.choice_weights == nullptr;
  const int tile = blockIdx.x, assignment = blockIdx.y;
  const int from = blockIdx.z * product.depth, to = min(from + product.depth, product.weight.k);
  auto const place = Weights::place_of(product.weight, tile, from);
  if (first_product) cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
  const int id = product.ids[assignment];
  if (first_product && blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < product.num_counters; i += kThreads) product.counters[i] = 0;
  }
  int count = 1;
  if constexpr (Distinct) {
    if (threadIdx.x == 0) list[0] = assignment, weights[0] = first_product ? 0.0f : product.choice_weights[assignment];
    __syncthreads();
  } else {
    count = assignments_of<kThreads>(product, id, list, weights);
  }
  const bool exists = Distinct || (id >= 0 && id < product.experts);
  if (exists && list[0] != assignment) return;  // another block has them
  if (exists) {
    // With more tokens, loads keep the memory busy, and asking ahead makes them slower.
    if (product.assignments == product.choices) Weights::prefetch_start(product.weight, id, tile, from, to);
    for (int done = 0; done < count; done += Weights::kRows) {
      const int rows = min(count - done, Weights::kRows);
      Weights::multiply(product, shared, id, place, from, to, list + done, rows, sums);
      __syncthreads();
      if (first_product) {
        store_hidden<T, kThreads, kTile>(product, tile, list + done, rows, sums);
      } else {
        store_partial<kThreads, kTile>(product, tile, list + done, weights + done, rows, sums);
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
    if (!first_product) store_partial<kThreads, kTile>(product, tile, list, weights, 1, sums);
  }
  if (first_product) return;
  // Each assignment arrives once for each part of the contracted axis, by the block that has it.
  __threadfence();
  __syncthreads();
  if (threadIdx.x < count) {
    const int token = token_of(product, list[threadIdx.x]);
    last_of[threadIdx.x] =
        atomicAdd(product.counters + token * gridDim.x + tile, 1) == product.choices * int(gridDim.z) - 1;
  }
  __syncthreads();
  __threadfence();
  for (int i = 0; i < count; ++i) {
    if (last_of[i]) combine<T, kThreads, kTile>(product, tile, token_of(product, list[i]));
  }
}

template <class T, class Weights, bool Distinct = false, class Launch>
cudaError_t launch_with(Product const& product, Launch launch) {
  const int columns = product.weight.n * product.weight.parts, tiles = ceil_div(columns, Weights::kTile);
  const dim3 grid(tiles, product.assignments, product.choice_weights == nullptr ? 1 : product.splits);
  return launch(multiply_experts<T, Weights, Distinct>, grid, Weights::kThreads);
}

// One token has few tiles. Small ones are shared by the SMs more evenly. If the GPU can hold all blocks of the first product with
// kFewBlocks on each SM, blocks may use more registers.
template <Code C, class Launch>
cudaError_t launch_coded(Product const& product, int num_sms, Launch launch) {
  constexpr int kFewBlocks = 7;
  using Small = Coded<C, 2 * kLeastTile>;
  if (product.distinct) {
    const int tiles = ceil_div(product.weight.n * product.weight.parts, Small::kTile);
    if (product.choice_weights == nullptr && tiles * product.assignments <= kFewBlocks * num_sms) {
      return launch_with<__nv_bfloat16, Coded<C, Small::kThreads, kFewBlocks, 1>, true>(product, launch);
    }
    return launch_with<__nv_bfloat16, Coded<C, Small::kThreads, Small::kBlocks, 1>, true>(product, launch);
  }
  if (product.assignments == product.choices && product.choices <= Small::kThreads) {
    return launch_with<__nv_bfloat16, Small>(product, launch);
  }
  return launch_with<__nv_bfloat16, Coded<C, kThreads>>(product, launch);
}

// Calls launch(kernel, grid, threads) with the kernel of a product on a device with so many SMs.
template <class Launch>
cudaError_t launch_kernel(Product const& product, int num_sms, Launch launch) {
  const bool one_token = product.assignments == product.choices, is_half = product.format == Format::kF16;
  switch (product.weight.code) {
    case Code::kDense:
      if (is_half && product.distinct) return launch_with<__half, Dense<__half, 1>, true>(product, launch);
      if (product.distinct) return launch_with<__nv_bfloat16, Dense<__nv_bfloat16, 1>, true>(product, launch);
      if (is_half && one_token) return launch_with<__half, Dense<__half, 1>>(product, launch);
      if (is_half) return launch_with<__half, Dense<__half, 4>>(product, launch);
      if (one_token) return launch_with<__nv_bfloat16, Dense<__nv_bfloat16, 1>>(product, launch);
      return launch_with<__nv_bfloat16, Dense<__nv_bfloat16, 4>>(product, launch);
    case Code::kE4m3:
      return launch_coded<Code::kE4m3>(product, num_sms, launch);
    case Code::kInt8:
      return launch_coded<Code::kInt8>(product, num_sms, launch);
    case Code::kMxfp4:
      return launch_coded<Code::kMxfp4>(product, num_sms, launch);
    case Code::kNvfp4:
      return launch_coded<Code::kNvfp4>(product, num_sms, launch);
    case Code::kInt4:
      return launch_coded<Code::kInt4>(product, num_sms, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace latent_moe::decode
