// Runs the epilogue of FP8 products that stores codes on the CPU, on all tiles of the schedule. The product is given.
#include <xmmintrin.h>

#include "cuda.h"

struct CUtensorMap {};

#include "sm90/encoded_epilogue.cuh"
#include "sm90/spec.h"

namespace sm90 = latent_moe::sm90;
using latent_moe::Activation, latent_moe::Contraction, latent_moe::Format, latent_moe::Residual;

struct Call {
  float const* product;  // [rows][width]; NaN where the kernel's accumulators hold no element
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
  using Spec = sm90::Spec<Contraction::kFwd, Format::kE4m3, Activation::kRelu2, Residual::kHidden, Rows, 128, 4, 1, 2>;
  latent_moe::Args args = {};
  args.problem = {call.group_sizes, call.experts, call.rows, 128, 0, call.width, call.rows_first};
  args.hidden = call.hidden;
  args.keep_residual = call.hidden != nullptr;
  args.codes = call.codes;
  args.code_scales = call.scales;
  args.power_of_two = call.power_of_two;
  std::vector<int> schedules(2 * (call.experts + 2));
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  blockDim = dim3(Spec::kConsumers * sm90::kWarpgroup);
  emulation::run_block(blockDim.x, [&] {
    const latent_moe::Schedule<typename Spec::Tiles> schedule(args.problem, schedules.data());
    const int warpgroup = threadIdx.x / sm90::kWarpgroup, thread = threadIdx.x % sm90::kWarpgroup, lane = thread % 32;
    const sm90::EncodedEpilogue<Spec> epilogue(args, emulation::shared, warpgroup, thread);
    int expert = 0;
    for (int id = 0; id < schedule.count(); ++id) {
      for (int rank = 0; rank < 2; ++rank) {
        latent_moe::Work work = schedule.work(id, expert);
        schedule.of_block(work, rank);
        for (int block = warpgroup; block < Rows / sm90::kBlock; block += Spec::kConsumers) {
          if (work.valid <= block * sm90::kBlock) continue;
          float acc[1][64] = {};
          for (int i = 0; i < 64 && work.steps > 0; ++i) {
            const int row = block * sm90::kBlock + thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
            const int column = work.column + i / 4 * 8 + lane % 4 * 2 + i % 2;
            const bool inside = row < work.valid && column < call.width;
            acc[0][i] = inside ? call.product[int64_t{work.row + row} * call.width + column] : column < call.width ? NAN : 0.0f;
          }
          epilogue.store_block(acc, work, block);
        }
      }
    }
  });
  _mm_setcsr(before);
}

}  // namespace

extern "C" void encoded(Call const* call, int tile_rows) {
  tile_rows == 256 ? run<256>(*call) : tile_rows == 192 ? run<192>(*call) : run<128>(*call);
}
