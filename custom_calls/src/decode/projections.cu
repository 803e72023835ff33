#include "decode/projections.cuh"

namespace latent_moe::decode {

cudaError_t multiply(Projections const& projections, bool is_early, cudaStream_t stream) {
  return launch_projections(projections, [&](auto* kernel, dim3 grid) {
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {grid.x, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(kProjectionThreads), config.stream = stream;
    config.attrs = attributes, config.numAttrs = is_early ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, projections);
  });
}

}  // namespace latent_moe::decode
