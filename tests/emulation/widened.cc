// Widens all tiles of a weight into fragments, as the warpgroups that multiply do, and puts the fragments in order.
#include <xmmintrin.h>

#include "cuda.h"

struct CUtensorMap {};

#include "sm90/fragments.cuh"

namespace sm90 = latent_moe::sm90;
using latent_moe::Code, latent_moe::Weight;

namespace {

constexpr int kStages = 2;

// Copies 128 bytes of each of some features to swizzled rows of a stage, as TMA does: zeros lie beyond the last feature and byte.
void copy(Weight const& weight, int64_t matrix, int first, int features, int at, char* stage) {
  const int bytes = weight.k / latent_moe::packing(weight.code);
  for (int row = 0; row < features; ++row) {
    for (int byte = 0; byte < sm90::kRowBytes; ++byte) {
      const bool inside = first + row < weight.n && at + byte < bytes;
      auto const* codes = static_cast<char const*>(weight.data) + (matrix * weight.n + first + row) * bytes;
      stage[row * sm90::kRowBytes + ((byte / 16 ^ row % 8) * 16 + byte % 16)] = inside ? codes[at + byte] : 0;
    }
  }
}

template <Code C, bool Halves, int Groups>
void run(Weight const& weight, int experts, int columns, int steps, uint16_t* widened) {
  constexpr int kGroups = Groups, kColumns = 64 * Groups, kPartElements = Groups == 2 ? 64 : 32;
  constexpr int kStageBytes = kColumns * sm90::kRowBytes;
  using Fragments = sm90::Fragments<C, Halves, kColumns, kPartElements>;
  constexpr int kOfMatrix = Halves ? kColumns / 2 : kColumns;  // columns of a matrix in a tile
  constexpr int kOfGroup = kOfMatrix / kGroups;                // and in a warpgroup
  for (int expert = 0; expert < experts; ++expert) {
    for (int column = 0; column < columns; column += kOfMatrix) {
      emulation::run_block(kGroups * sm90::kWarpgroup, [&] {
        const int group = threadIdx.x / sm90::kWarpgroup, thread = threadIdx.x % sm90::kWarpgroup, lane = thread % 32;
        Fragments fragments(weight, group, thread);
        fragments.begin(expert, column);
        for (int step = 0; step < steps; ++step) {
          const int of_stage = step % sm90::kStageSteps<C>, place = step / sm90::kStageSteps<C> % kStages * kStageBytes;
          if (of_stage == 0) {
            __syncthreads();
            const int at = step * sm90::kStepElements / latent_moe::packing(C);
            for (int half = 0; threadIdx.x == 0 && half < 1 + Halves; ++half) {
              copy(weight, (1 + Halves) * expert + half, column, kOfMatrix, at,
                   emulation::shared + place + half * kOfMatrix * sm90::kRowBytes);
            }
            __syncthreads();
          }
          if (fragments.is_idle()) continue;
          fragments.take(step);
          for (int part = 0; part < Fragments::kParts; ++part) {
            typename Fragments::Codes codes;
            typename Fragments::Fragment fragment;
            fragments.read(codes, place, of_stage, part);
            fragments.widen(fragment, codes, part);
            // PTX: the first operand of wgmma.m64nNk16 in registers.
            for (int i = 0; i < kPartElements / 4; ++i) {
              const int row = thread / 32 * 16 + i % 2 * 8 + lane / 4;
              const int feature = Halves ? group * kOfGroup + row / 16 * 8 + row % 8 : group * kOfGroup + row;
              const int64_t matrix = Halves ? 2 * expert + row / 8 % 2 : expert;
              const int k = step * sm90::kStepElements + part * kPartElements + i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
              const int64_t to = (matrix * columns + column + feature) * steps * sm90::kStepElements + k;
              std::memcpy(widened + to, &fragment[i / 4][i % 4], 4);
            }
          }
        }
      });
    }
  }
}

template <Code C>
void run(Weight const& weight, int experts, int groups, int columns, int steps, uint16_t* widened) {
  const auto two = weight.parts == 2 ? run<C, true, 2> : run<C, false, 2>;
  const auto three = weight.parts == 2 ? run<C, true, 3> : run<C, false, 3>;
  (groups == 2 ? two : three)(weight, experts, columns, steps, widened);
}

}  // namespace

// widened [experts][parts][columns][128 steps], with whole tiles of columns for so many warpgroups.
extern "C" void widen(Weight const* weight, int experts, int groups, int columns, int steps, uint16_t* widened) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  constexpr decltype(&run<Code::kInt4>) kOf[] = {nullptr, run<Code::kE4m3>, run<Code::kInt8>, run<Code::kMxfp4>,
                                                 run<Code::kNvfp4>, run<Code::kInt4>};
  kOf[int(weight->code)](*weight, experts, groups, columns, steps, widened);
  _mm_setcsr(before);
}

extern "C" float scale_of_sum(Weight const* weight, int64_t matrix, int column) {
  return sm90::scale_of_sum(*weight, matrix, column);
}
