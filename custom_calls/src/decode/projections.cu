#include "decode/projections.cuh"

namespace latent_moe::decode {

cudaError_t multiply(Projections const& projections, cudaStream_t stream) {
  return launch_projections(projections, [&](auto* kernel, dim3 grid) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {grid.x, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(kProjectionThreads), config.stream = stream;
    config.attrs = &cluster, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, projections);
  });
}

}  // namespace latent_moe::decode
