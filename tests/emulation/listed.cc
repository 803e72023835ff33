// Runs the kernels of listed rows on the CPU.
#include <xmmintrin.h>

#include "cuda.h"

#include "decode/listed_launch.cuh"

namespace {

using namespace latent_moe::decode;

template <class Kernel, class Arguments>
void run(Kernel* kernel, dim3 grid, int threads, Arguments const& arguments) {
  gridDim = grid, blockIdx = {};
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) emulation::run_block(threads, [&] { kernel(arguments); });
  }
}

void multiply(Listed const& listed) {
  launch_listed(listed, [&](auto* kernel, dim3 grid, int threads, int bytes, int most_bytes, Listed const& given) {
    if (bytes > most_bytes) std::fprintf(stderr, "a block has too much shared memory\n"), std::abort();
    std::memset(dynamic_shared(), 0xff, bytes);  // NaN
    run(kernel, grid, threads, given);
    return cudaSuccess;
  });
}

}  // namespace

extern "C" void multiply_listed(Listed const* first, Listed const* second) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  Product const& product = second->product;
  run(list_assignments, dim3(latent_moe::ceil_div(product.experts + 1, kThreads / 32)), kThreads, *first);
  multiply(*first);
  multiply(*second);
  run(combine_choices, dim3(latent_moe::ceil_div(product.weight.n, kCombined), product.assignments / product.choices), kThreads,
      product);
  _mm_setcsr(before);
}
