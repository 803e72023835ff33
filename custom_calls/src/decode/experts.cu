#include "decode/experts.cuh"

namespace latent_moe::decode {

cudaError_t multiply(Product const& product, cudaStream_t stream) {
  return launch_kernel(product, [&](auto* kernel, dim3 grid) {
    kernel<<<grid, kThreads, 0, stream>>>(product);
    return cudaGetLastError();
  });
}

}  // namespace latent_moe::decode
