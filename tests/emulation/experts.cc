// Runs the kernels of src/decode on the CPU.
#include "cuda.h"

#include "decode/experts.cuh"

extern "C" void multiply_experts(latent_moe::decode::Product const* product) {
  using namespace latent_moe::decode;
  launch_kernel(*product, [&](auto* kernel, dim3 grid) {
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          emulation::run_block(kThreads, [&] { kernel(*product); });
        }
      }
    }
    return cudaSuccess;
  });
}
