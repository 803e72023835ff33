#include "decode/experts.cuh"

namespace latent_moe::decode {

cudaError_t multiply(Product const& product, bool is_early, cudaStream_t stream) {
  int device = 0, num_sms = 0;
  auto error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return launch_kernel(product, num_sms, [&](auto* kernel, dim3 grid, int threads) {
    // The second product reads weights until it waits for the first one's rows. The first one waits for the choice.
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream;
    config.attrs = &early, config.numAttrs = is_early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, product);
  });
}

}  // namespace latent_moe::decode
