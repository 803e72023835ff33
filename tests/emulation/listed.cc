// Runs the kernels of listed rows on the CPU.
#include <xmmintrin.h>

#include "cuda.h"
#include "unfinished.h"

#include "decode/listed_launch.cuh"

namespace {

using namespace latent_moe::decode;
using Results = std::vector<emulation::Unfinished::Memory>;

// Runs a kernel that is launched early, with the results of the kernel before.
template <class Kernel, class Arguments>
void run(Kernel* kernel, dim3 grid, int threads, Arguments const& arguments, Results const& before) {
  const emulation::Unfinished unfinished(before);
  gridDim = grid, blockIdx = {};
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) unfinished.run_block(threads, [&] { kernel(arguments); });
  }
}

void multiply(Listed const& listed, Results const& before) {
  launch_listed(listed, [&](auto* kernel, dim3 grid, int threads, int bytes, int most_bytes, Listed const& given) {
    if (bytes > most_bytes) std::fprintf(stderr, "a block has too much shared memory\n"), std::abort();
    std::memset(dynamic_shared(), 0xff, bytes);  // NaN
    run(kernel, grid, threads, given, before);
    return cudaSuccess;
  });
}

}  // namespace

extern "C" void multiply_listed(Listed const* first, Listed const* second) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  Product const& product = second->product;
  const size_t experts = product.experts, assignments = product.assignments;
  run(list_assignments, dim3(latent_moe::ceil_div(product.experts + 1, kThreads / 32)), kThreads, *first, {});
  multiply(*first, {{first->starts, (experts + 1) * sizeof(int32_t)}, {first->list, assignments * sizeof(int32_t)}});
  multiply(*second, {{const_cast<void*>(product.rows), assignments * product.weight.k * sizeof(__nv_bfloat16)}});
  run(combine_choices, dim3(latent_moe::ceil_div(product.weight.n, kCombined), product.assignments / product.choices), kThreads,
      product, {{product.partial, assignments * kPieces * product.weight.n * sizeof(float)}});
  _mm_setcsr(before);
}
