// Runs the kernel of projections on the CPU.
#include <xmmintrin.h>

#include "cuda.h"

#include "decode/projections.cuh"

extern "C" void multiply_projections(latent_moe::decode::Projections const* given) {
  namespace decode = latent_moe::decode;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  decode::launch_projections(*given, [&](auto* kernel, dim3 grid) {
    gridDim = grid;
    blockIdx = {};
    for (; blockIdx.y < grid.y; ++blockIdx.y) {
      for (unsigned part = grid.x; part-- > 0;) {
        blockIdx.x = part;
        emulation::run_block(decode::kProjectionThreads, [&] { kernel(*given); });
      }
    }
    return cudaSuccess;
  });
  _mm_setcsr(before);
}
