// Runs the kernels for few tokens on the CPU.
#include <xmmintrin.h>

#include "cuda.h"
#include "unfinished.h"

#include "decode/experts.cuh"
#include "routing/top_k.cuh"

namespace {

using latent_moe::Code;
using namespace latent_moe::decode;

void store(uint32_t pair, float* first, float* second) { *first = bfloat16(pair, 0), *second = bfloat16(pair, 1); }

template <Code C>
void widen_8_bits(uint32_t word, float* to) {
  const int apart = C == Code::kInt8 ? 2 : 1, next = 3 - apart;
  store(Widen<C>::template pair<0>(word), to, to + apart);
  store(Widen<C>::template pair<1>(word), to + next, to + next + apart);
}

template <Code C>
void widen_4_bits(uint32_t word, typename Widen<C>::Scale scale, float* to) {
  store(Widen<C>::template pair<0>(word, scale), to, to + 1);
  store(Widen<C>::template pair<1>(word, scale), to + 2, to + 3);
  store(Widen<C>::template pair<2>(word, scale), to + 4, to + 5);
  store(Widen<C>::template pair<3>(word, scale), to + 6, to + 7);
}

}  // namespace

// The values of a word of codes, in the order of the bytes or of the pairs.
extern "C" void widen(int code, uint32_t word, uint32_t scale, uint32_t zero, float* to) {
  switch (Code(code)) {
    case Code::kE4m3:
      return widen_8_bits<Code::kE4m3>(word, to);
    case Code::kInt8:
      return widen_8_bits<Code::kInt8>(word, to);
    case Code::kMxfp4:
      return widen_4_bits<Code::kMxfp4>(word, Widen<Code::kMxfp4>::scale(scale), to);
    case Code::kNvfp4:
      return widen_4_bits<Code::kNvfp4>(word, Widen<Code::kNvfp4>::scale(scale), to);
    case Code::kInt4:
      return widen_4_bits<Code::kInt4>(word, Widen<Code::kInt4>::scale(scale, zero), to);
    default:
      std::abort();
  }
}

extern "C" void multiply_experts(latent_moe::decode::Product const* product, int num_sms) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  // The first product writes the rows of the second one, and the counters. A kernel of the same call may make the choice.
  std::vector<emulation::Unfinished::Memory> results;
  emulation::triggers_after_wait = product->distinct && product->choice_weights == nullptr;
  if (emulation::triggers_after_wait) {
    results = {{const_cast<int32_t*>(product->ids), product->assignments * sizeof(int32_t)}};
  } else if (product->choice_weights != nullptr) {
    const size_t rows = size_t(product->assignments) * product->weight.k * 2;  // bytes
    results = {{const_cast<void*>(product->rows), rows}, {product->counters, product->num_counters * sizeof(int32_t)}};
  }
  const emulation::Unfinished before_it(results);
  launch_kernel(*product, num_sms, [&](auto* kernel, dim3 grid, int threads) {
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          before_it.run_block(threads, [&] { kernel(*product); });
        }
      }
    }
    return cudaSuccess;
  });
  emulation::triggers_after_wait = false;
  _mm_setcsr(before);
}

extern "C" void choose(float const* scores, int32_t* ids, int rows, int columns, int k,
                       latent_moe::routing::Weighing const* weighing) {
  namespace routing = latent_moe::routing;
  gridDim = dim3((rows + routing::kWarps - 1) / routing::kWarps);
  blockIdx = {};
  auto* kernel = columns <= 128 ? routing::choose<4> : routing::choose<16>;
  for (; blockIdx.x < gridDim.x; ++blockIdx.x) {
    emulation::run_block(32 * routing::kWarps, [&] { kernel(scores, ids, rows, columns, k, *weighing); });
  }
}

// The choice of few rows. Their scores are unfinished until a block waits for the kernel before.
extern "C" void choose_of_few(latent_moe::routing::Scores const* scores, int32_t* ids, int rows, int columns, int k,
                              latent_moe::routing::Weighing const* weighing) {
  namespace routing = latent_moe::routing;
  gridDim = dim3(rows);
  blockIdx = {};
  blockDim = dim3(routing::threads_of(columns));
  const emulation::Unfinished before_it({{const_cast<float*>(scores->values), size_t(rows) * columns * sizeof(float)}});
  for (; blockIdx.x < gridDim.x; ++blockIdx.x) {
    before_it.run_block(blockDim.x, [&] { routing::choose_in_block(*scores, ids, columns, k, *weighing); });
  }
}
