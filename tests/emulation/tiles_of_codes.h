// Walks through the tiles of a product of codes on the CPU, as its kernel does. The product is given.
#pragma once

#include <xmmintrin.h>

#include "cuda.h"

struct CUtensorMap {};

#include "common/schedule.cuh"
#include "sm90/instructions.cuh"
#include "sm90/spec.h"

namespace emulation {

// Calls use(args, work, block, thread, acc) for each 64-row block that holds rows, in each thread of its warpgroup. Accumulators
// are NaN in rows beyond those of the expert, and `beyond` in columns beyond the product's.
template <class Spec, class Call, class Use>
void on_blocks(Call const& call, latent_moe::Args args, float beyond, Use const& use) {
  namespace sm90 = latent_moe::sm90;
  args.problem = {call.group_sizes, call.experts, call.rows, 128, 0, call.width, call.rows_first};
  args.codes = call.codes;
  args.code_scales = call.scales;
  args.power_of_two = call.power_of_two;
  std::vector<int> schedules(2 * (call.experts + 2));
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  blockDim = dim3(Spec::kConsumers * sm90::kWarpgroup);
  run_block(blockDim.x, [&] {
    const latent_moe::Schedule<typename Spec::Tiles> schedule(args.problem, schedules.data());
    const int warpgroup = threadIdx.x / sm90::kWarpgroup, thread = threadIdx.x % sm90::kWarpgroup, lane = thread % 32;
    int expert = 0;
    for (int id = 0; id < schedule.count(); ++id) {
      for (int rank = 0; rank < 2; ++rank) {
        latent_moe::Work work = schedule.work(id, expert);
        schedule.of_block(work, rank);
        for (int block = warpgroup; block * sm90::kBlock < Spec::kTile.rows; block += Spec::kConsumers) {
          if (work.valid <= block * sm90::kBlock) continue;
          float acc[64] = {};
          for (int i = 0; i < 64 && work.steps > 0; ++i) {
            const int row = block * sm90::kBlock + thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
            const int column = work.column + i / 4 * 8 + lane % 4 * 2 + i % 2;
            const bool inside = row < work.valid && column < call.width;
            acc[i] = inside ? call.product[int64_t{work.row + row} * call.width + column] : column < call.width ? NAN : beyond;
          }
          use(args, work, block, thread, acc);
        }
      }
    }
  });
  _mm_setcsr(before);
}

}  // namespace emulation
