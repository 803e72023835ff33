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
  return launch<2>(scores, ids, rows, columns, k, weighing, stream);
}

}  // namespace latent_moe::routing
