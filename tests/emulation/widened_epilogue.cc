// Runs the epilogue of products with widened weights on the CPU. The product is given.
#include <xmmintrin.h>

#include <cmath>

#include "cuda.h"

struct CUtensorMap {};

#include "common/schedule.cuh"
#include "sm90/instructions.cuh"
#include "sm90/spec.h"
#include "sm90/widened_epilogue.cuh"

using latent_moe::Activation, latent_moe::Contraction, latent_moe::Format, latent_moe::Residual;
namespace sm90 = latent_moe::sm90;

struct Call {
  float const* product;  // [rows][parts * width]
  void* out;
  void* hidden;
  int32_t const* group_sizes;
  int experts, rows, width;
  bool rows_first, keep_residual;
  float beta, linear_beta;
};

namespace {

template <class Spec>
void run(Call const& call) {
  constexpr bool kHalves = Spec::kHalves;
  latent_moe::Args args = {};
  args.problem = {call.group_sizes, call.experts, call.rows, 128, 0, call.width, call.rows_first};
  args.out = call.out, args.hidden = call.hidden, args.keep_residual = call.keep_residual;
  args.beta = call.beta, args.linear_beta = call.linear_beta;
  std::vector<int> schedules(2 * (call.experts + 2));
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  blockDim = dim3(Spec::kConsumers * sm90::kWarpgroup);
  emulation::run_block(blockDim.x, [&] {
    const latent_moe::Schedule<typename Spec::Tiles> schedule(args.problem, schedules.data());
    const int warpgroup = threadIdx.x / sm90::kWarpgroup, thread = threadIdx.x % sm90::kWarpgroup, lane = thread % 32;
    const sm90::WidenedEpilogue<Spec> epilogue(args, emulation::shared, warpgroup, thread);
    int expert = 0;
    for (int id = 0; id < schedule.count(); ++id) {
      const latent_moe::Work work = schedule.work(id, expert);
      float acc[Spec::kTile.rows / 2] = {};
      const float scales[2] = {std::ldexp(1.0f, lane % 4), std::ldexp(1.0f, 2 + lane % 4)};
      for (int i = 0; i < Spec::kTile.rows / 2 && work.steps > 0; ++i) {
        // PTX: the sums of wgmma.m64nNk16, whose rows are features here and whose columns are rows.
        const int m = thread / 32 * 16 + i / 2 % 2 * 8 + lane / 4, row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int feature = work.column + (kHalves ? warpgroup * 32 + m / 16 * 8 + m % 8 : warpgroup * 64 + m);
        const int half = kHalves ? m / 8 % 2 : 0;
        const bool inside = row < work.valid && feature < call.width;
        const int64_t at = int64_t{work.row + row} * call.width * (1 + kHalves) + half * call.width + feature;
        acc[i] = inside ? call.product[at] / scales[i / 2 % 2] : NAN;
      }
      epilogue.template finish<true>(acc, scales, work);
    }
  });
  _mm_setcsr(before);
}

// In tiles for two or three warpgroups.
template <Activation A, Residual R>
void run_for(int groups, Call const& call) {
  if (groups == 2) return run<sm90::Spec<Contraction::kFwd, Format::kBf16Codes, A, R, 256, 128, 4, 1, 1>>(call);
  run<sm90::Spec<Contraction::kFwd, Format::kBf16Codes, A, R, 192, 192, 5, 1, 1>>(call);
}

}  // namespace

extern "C" void widened_epilogue(Call const* call, int activation, int groups) {
  constexpr decltype(&run_for<Activation::kNone, Residual::kNone>) kOf[] = {
      run_for<Activation::kNone, Residual::kNone>,       run_for<Activation::kRelu2, Residual::kHidden>,
      run_for<Activation::kGelu, Residual::kPre>,        run_for<Activation::kGeluTanh, Residual::kPre>,
      run_for<Activation::kSwiglu, Residual::kGateHidden>, run_for<Activation::kGeglu, Residual::kGateHidden>,
      run_for<Activation::kGegluTanh, Residual::kGateHidden>, run_for<Activation::kSituGlu, Residual::kPre>};
  kOf[activation](groups, *call);
}
