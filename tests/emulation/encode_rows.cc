// Runs the encoders of rows on the CPU.
#include <xmmintrin.h>

#include "cuda.h"

#include "formats/encode_rows.cuh"

namespace formats = latent_moe::formats;

namespace {

template <class Kernel>
void run_tiles(formats::RowCodes const& to, Kernel const& kernel) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  const int64_t rows = (to.rows + formats::kTileRows - 1) / formats::kTileRows;
  gridDim = dim3(rows * ((to.k + formats::kBlock - 1) / formats::kBlock));
  blockIdx = {};
  for (; blockIdx.x < gridDim.x; ++blockIdx.x) emulation::run_block(formats::kRowThreads, kernel);
  _mm_setcsr(before);
}

template <class T>
void encode(formats::EncodeRows const& call) {
  run_tiles(call.to, [&] { formats::encode_row_blocks(static_cast<T const*>(call.values), call.to); });
}

template <class T>
void gradient(formats::Relu2Gradient const& call) {
  run_tiles(call.to, [&] {
    formats::relu2_gradient_blocks(static_cast<T const*>(call.dhidden), static_cast<T const*>(call.hidden), call.row_weights,
                                   static_cast<T*>(call.dpre), call.row_weight_sums, call.to);
  });
}

}  // namespace

extern "C" void encode_rows(formats::EncodeRows const* call) {
  if (call->source == formats::Source::kF32) return encode<float>(*call);
  return call->source == formats::Source::kBf16 ? encode<__nv_bfloat16>(*call) : encode<__half>(*call);
}

extern "C" void relu2_gradient(formats::Relu2Gradient const* call) {
  call->source == formats::Source::kBf16 ? gradient<__nv_bfloat16>(*call) : gradient<__half>(*call);
}
