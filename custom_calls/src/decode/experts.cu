#include "decode/experts.cuh"

namespace latent_moe::decode {

cudaError_t multiply(Product const& product, cudaStream_t stream) {
  return launch_kernel(product, [&](auto* kernel, dim3 grid, int threads) {
    // The second product starts while the first one ends. It reads weights until it waits for the first one's rows.
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream;
    config.attrs = &early, config.numAttrs = product.choice_weights == nullptr ? 0 : 1;
    return cudaLaunchKernelEx(&config, kernel, product);
  });
}

}  // namespace latent_moe::decode
