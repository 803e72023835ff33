// Runs the epilogue of FP8 products that stores codes on the CPU.
#include "tiles_of_codes.h"

#include "sm90/encoded_epilogue.cuh"

using latent_moe::Activation, latent_moe::Contraction, latent_moe::Format, latent_moe::Residual;

struct Call {
  float const* product;  // [rows][width]
  void* hidden;          // [rows][width], or null
  uint8_t* codes;
  float* scales;
  int32_t const* group_sizes;
  int experts, rows, width;
  bool power_of_two, rows_first;
};

namespace {

template <int Rows>
void run(Call const& call) {
  namespace sm90 = latent_moe::sm90;
  using Spec = sm90::Spec<Contraction::kFwd, Format::kE4m3, Activation::kRelu2, Residual::kHidden, Rows, 128, 4, 1, 2>;
  latent_moe::Args args = {};
  args.hidden = call.hidden;
  args.keep_residual = call.hidden != nullptr;
  // The columns beyond are products of codes that TMA reads as zeros.
  emulation::on_blocks<Spec>(call, args, 0.0f, [](auto const& args, auto const& work, int block, int thread, auto const& acc) {
    const int warpgroup = threadIdx.x / sm90::kWarpgroup;
    sm90::EncodedEpilogue<Spec>(args, emulation::shared, warpgroup, thread).store_block(&acc, work, block);
  });
}

}  // namespace

extern "C" void encoded(Call const* call, int tile_rows) {
  tile_rows == 256 ? run<256>(*call) : tile_rows == 192 ? run<192>(*call) : run<128>(*call);
}
