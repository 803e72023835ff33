// One of Hopper's compiled kernels as a type: all of its compile-time constants.
#pragma once

#include <cuda_runtime_api.h>

#include "common/args.h"
#include "common/kernel.h"

namespace latent_moe::sm90 {

constexpr int kLoadedRows = 64;  // of the boxes in which the rows of fwd and dgrad are loaded
constexpr int kStoredRows = 16;  // of the boxes in which a weight gradient is stored

// The kernel and its epilogues are templates over such a type and read its constants.
template <Contraction C, Format F, Activation A, Residual R, int Rows, int Columns, int Stages, int ClusterRows,
          int ClusterColumns>
struct Spec {
  static constexpr Contraction kContraction = C;
  static constexpr Format kFormat = F;
  static constexpr Activation kActivation = A;
  static constexpr Residual kResidual = R;
  static constexpr Tile kTile = {Rows, Columns, Stages, ClusterRows, ClusterColumns};

  static constexpr bool kWgrad = C == Contraction::kWgrad;
  // Whether the operands are codes with scales. Each step's product is then multiplied by the scales and added in float32, and
  // both warpgroups work on one tile.
  static constexpr bool kScaled = F == Format::kE4m3;
  // Whether the weight is in codes, which the warps that multiply widen to bfloat16 (widened_kernel.cuh).
  static constexpr bool kWidens = F == Format::kBf16Codes;
  static constexpr int kColumns = C == Contraction::kFwd && is_gated(A) ? Columns / 2 : Columns;  // of the hidden rows in a tile
  // Warpgroups that multiply: three share a tile of 192 rows of codes, or one of 192 features of a weight that they widen.
  static constexpr int kConsumers = kWidens ? Columns / 64 : kScaled && Rows % 128 != 0 ? 3 : 2;
  static constexpr bool kActivates = C == Contraction::kFwd && A != Activation::kNone;
  static constexpr bool kDifferentiates = C == Contraction::kDgrad && A != Activation::kNone;
  // Whether a tile of the product is half gate, half up.
  static constexpr bool kHalves = kActivates && is_gated(A);
  // Whether hidden rows can be stored as codes, or the gradient of the pre-activation is. A scale is of 128 columns of a row,
  // which must be in one warpgroup.
  static constexpr bool kEncodes = kScaled && (kActivates || kDifferentiates) && kColumns == kScaleBlock;

  // Whether wgmma's operands are swapped: rows lie along its N axis, of any multiple of 8, rather than along its M axis
  // of 64. The tiles of an expert then have equal heights, and multiply few padding rows. Tiles of three column blocks gain
  // nothing, because each block reads the rows from shared memory again. Small tiles are bound by reading weights. Among
  // kernels of dense weights, only plain products and gated activations have such tiles.
  static constexpr bool kSwapAb =
      kWidens || (!kWgrad && !kScaled && (A == Activation::kNone || kHalves) && Rows > 64 && Columns != 192);

  // Elements of the contracted axis that a step multiplies. Large tiles of wgrad wait for loads. They take steps of 32, so
  // that more of the ring is being loaded. In a smaller tile, such a step would end before the next stage arrives.
  static constexpr int kStepDepth = kScaled || kWidens ? kScaleBlock : kWgrad && Rows * Columns > 128 * 128 ? 32 : 64;

  // Whether a counter deals out tiles; gathering rows needs one. A kernel with small tiles is bound by reading each weight
  // once, and does better without clearing a counter.
  static constexpr bool kCounts = Rows > 64;

  // The constants that Schedule needs (common/schedule.cuh).
  struct Tiles {
    static constexpr bool kWgrad = Spec::kWgrad, kEvenHeights = Spec::kSwapAb;
    static constexpr int kRows = Rows, kColumns = Spec::kColumns;
    static constexpr int kClusterRows = ClusterRows, kClusterColumns = ClusterColumns;
    static constexpr int kStepDepth = Spec::kStepDepth;
  };

  static_assert((A == Activation::kNone) == (R == Residual::kNone), "an activation has a residual, and nothing else has");
  static_assert(A == Activation::kNone || C != Contraction::kWgrad, "weight gradients have no activation");
  static_assert(R != Residual::kHidden || A == Activation::kRelu2, "hidden rows determine relu2's slope alone");
  static_assert(R != Residual::kGateHidden || (is_gated(A) && A != Activation::kSituGlu),
                "gate and hidden rows determine the up half where hidden rows are a function of the gate times the up half");
  static_assert(element_bytes(product_format(F)) == 2, "epilogues pack pairs of 16-bit elements");
  static_assert(!kScaled || C == Contraction::kFwd ||
                    (kDifferentiates && R == Residual::kHidden && kEncodes && Rows == 64 * kConsumers),
                "codes have fwd, and the dgrad of relu2 with a 64-row block of 128 columns for each warpgroup");
  static_assert(!kWidens || (C == Contraction::kFwd && ((Rows == 256 && Columns == 128) || (Rows == 192 && Columns == 192)) &&
                             ClusterRows * ClusterColumns == 1),
                "codes are widened for fwd alone, 64 features of a weight for each of two or three warpgroups");
  static_assert(!kScaled || !is_gated(A) || kEncodes, "a gated epilogue of codes stores codes alone");
  static_assert(!kScaled || Rows % (64 * kConsumers) == 0, "warpgroups multiply equal numbers of blocks of a tile of codes");
};

template <class Spec>
cudaError_t launch(Args const& args, int num_sms, cudaStream_t stream);

// The number of experts that fit: their bounds share an SM's shared memory with the stages.
template <class Spec>
int max_experts();

}  // namespace latent_moe::sm90

// Compiles one kernel, behind the header that defines it: the arguments are Spec's.
#define LATENT_MOE_COMPILE(contraction, format, activation, residual, ...)                                                  \
  namespace latent_moe::sm90 {                                                                                              \
  using Compiled = Spec<Contraction::contraction, Format::format, Activation::activation, Residual::residual, __VA_ARGS__>; \
  template cudaError_t launch<Compiled>(Args const&, int, cudaStream_t);                                                    \
  template int max_experts<Compiled>();                                                                                     \
  }
