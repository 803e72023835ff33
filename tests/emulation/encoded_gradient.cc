// Runs the epilogue of FP8 products with relu2's gradient on the CPU.
#include "tiles_of_codes.h"

#include "sm90/encoded_gradient_epilogue.cuh"

using latent_moe::Activation, latent_moe::Contraction, latent_moe::Format, latent_moe::Residual;

struct Call {
  float const* product;  // [rows][width]
  void* hidden;          // the gradient overwrites them
  float const* row_weights;
  uint8_t* codes;
  float *scales, *sums;
  int32_t const* group_sizes;
  int experts, rows, width;
  bool power_of_two, rows_first;
};

namespace {

template <int Rows>
void run(Call const& call) {
  namespace sm90 = latent_moe::sm90;
  using Spec = sm90::Spec<Contraction::kDgrad, Format::kE4m3, Activation::kRelu2, Residual::kHidden, Rows, 128, 4, 1, 2>;
  using Epilogue = sm90::EncodedGradientEpilogue<Spec>;
  static_assert(Epilogue::kSharedBytes <= sizeof emulation::shared);
  latent_moe::Args args = {};
  args.out = call.hidden;
  args.residual = call.hidden;
  args.row_weights = call.row_weights;
  args.partial = call.sums;
  emulation::on_blocks<Spec>(call, args, NAN, [](auto const& args, auto const& work, int block, int thread, auto const& acc) {
    const Epilogue epilogue(args, emulation::shared, block, thread);
    epilogue.store_block(acc, work, block, epilogue.begin(work, block));
  });
}

}  // namespace

extern "C" void encoded_gradient(Call const* call, int tile_rows) { tile_rows == 192 ? run<192>(*call) : run<128>(*call); }
