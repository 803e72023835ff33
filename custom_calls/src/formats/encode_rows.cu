#include "formats/encode_rows.cuh"

namespace latent_moe::formats {
namespace {

unsigned tiles(RowCodes const& to) {
  return static_cast<unsigned>((to.rows + kTileRows - 1) / kTileRows * ((to.k + kBlock - 1) / kBlock));
}

template <class T>
cudaError_t launch(EncodeRows const& call, cudaStream_t stream) {
  encode_row_blocks<<<tiles(call.to), kRowThreads, 0, stream>>>(static_cast<T const*>(call.values), call.to);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(Relu2Gradient const& call, cudaStream_t stream) {
  relu2_gradient_blocks<<<tiles(call.to), kRowThreads, 0, stream>>>(
      static_cast<T const*>(call.dhidden), static_cast<T const*>(call.hidden), call.row_weights,
      static_cast<T*>(call.dpre), call.row_weight_sums, call.to);
  return cudaGetLastError();
}

}  // namespace

cudaError_t encode_rows(EncodeRows const& call, cudaStream_t stream) {
  switch (call.source) {
    case Source::kF32:
      return launch<float>(call, stream);
    case Source::kBf16:
      return launch<__nv_bfloat16>(call, stream);
    case Source::kF16:
      return launch<__half>(call, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t relu2_gradient(Relu2Gradient const& call, cudaStream_t stream) {
  switch (call.source) {
    case Source::kBf16:
      return launch<__nv_bfloat16>(call, stream);
    case Source::kF16:
      return launch<__half>(call, stream);
    case Source::kF32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace latent_moe::formats
