// Runs the kernel that decodes a weight on the CPU.
#include <xmmintrin.h>

#include "cuda.h"

#include "formats/decode_weight.cuh"

namespace formats = latent_moe::formats;
using latent_moe::Code;

namespace {

template <Code C, class T>
void decode(formats::DecodeWeight const& call) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  gridDim = dim3((call.features + formats::kDecodeFeatures - 1) / formats::kDecodeFeatures);
  blockIdx = {};
  for (; blockIdx.x < gridDim.x; ++blockIdx.x) {
    emulation::run_block(formats::kDecodeThreads, [&] { formats::decode_features<C, T>(call); });
  }
  _mm_setcsr(before);
}

template <Code C>
void decode_to(formats::DecodeWeight const& call) {
  call.format == latent_moe::Format::kBf16 ? decode<C, __nv_bfloat16>(call) : decode<C, __half>(call);
}

}  // namespace

extern "C" void decode_weight(formats::DecodeWeight const* call) {
  switch (call->weight.code) {
    case Code::kE4m3:
      return decode_to<Code::kE4m3>(*call);
    case Code::kInt8:
      return decode_to<Code::kInt8>(*call);
    case Code::kMxfp4:
      return decode_to<Code::kMxfp4>(*call);
    case Code::kNvfp4:
      return decode_to<Code::kNvfp4>(*call);
    case Code::kInt4:
      return decode_to<Code::kInt4>(*call);
    case Code::kDense:
      return;
  }
}
