#include "formats/decode_weight.cuh"

namespace latent_moe::formats {
namespace {

template <Code C>
cudaError_t launch(DecodeWeight const& call, cudaStream_t stream) {
  const int blocks = (call.features - 1) / kDecodeFeatures + 1;
  auto const kernel = call.format == Format::kBf16 ? decode_features<C, __nv_bfloat16> : decode_features<C, __half>;
  kernel<<<blocks, kDecodeThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t decode_weight(DecodeWeight const& call, cudaStream_t stream) {
  switch (call.weight.code) {
    case Code::kE4m3:
      return launch<Code::kE4m3>(call, stream);
    case Code::kInt8:
      return launch<Code::kInt8>(call, stream);
    case Code::kMxfp4:
      return launch<Code::kMxfp4>(call, stream);
    case Code::kNvfp4:
      return launch<Code::kNvfp4>(call, stream);
    case Code::kInt4:
      return launch<Code::kInt4>(call, stream);
    case Code::kDense:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace latent_moe::formats
