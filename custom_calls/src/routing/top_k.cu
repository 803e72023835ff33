#include "routing/top_k.cuh"

namespace latent_moe::routing {
namespace {

template <int Each>
cudaError_t launch(float const* scores, int32_t* ids, int rows, int columns, int k, Weighing const& weighing,
                   cudaStream_t stream) {
  if (columns <= Each * kWarp) {
    choose<Each><<<(rows + kWarps - 1) / kWarps, kWarp * kWarps, 0, stream>>>(scores, ids, rows, columns, k, weighing);
    return cudaGetLastError();
  }
  if constexpr (Each * kWarp < kMostScores) {
    return launch<2 * Each>(scores, ids, rows, columns, k, weighing, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t top_k(float const* scores, int32_t* ids, int rows, int columns, int k, Weighing const& weighing,
                  cudaStream_t stream) {
  if (rows <= kFewRows && k <= kMostWeights) {
    return top_k_of_few({scores, nullptr, false}, ids, rows, columns, k, weighing, false, stream);
  }
  return launch<2>(scores, ids, rows, columns, k, weighing, stream);
}

cudaError_t top_k_of_few(Scores const& scores, int32_t* ids, int rows, int columns, int k, Weighing const& weighing, bool is_early,
                         cudaStream_t stream) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(rows), config.blockDim = dim3(threads_of(columns)), config.stream = stream;
  config.attrs = &early, config.numAttrs = is_early ? 1 : 0;
  return cudaLaunchKernelEx(&config, choose_in_block, scores, ids, columns, k, weighing);
}

}  // namespace latent_moe::routing
