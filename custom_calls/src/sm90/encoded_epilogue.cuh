// Stores the hidden rows of a product of codes as codes again, with a scale for each 128 columns of a row.
//
// The 128 columns of a row are in the four threads of a quad. So their largest magnitude needs two shuffles, and the codes are
// those of encode_rows (formats/encode_rows.h) of the rounded hidden rows, to the bit.
#pragma once

#include "common/schedule.cuh"
#include "formats/e4m3.cuh"
#include "sm90/activation.cuh"
#include "sm90/piece.cuh"

namespace latent_moe::sm90 {

// Spec has the static constants kActivation, kResidual and kColumns, which is 128 (spec.h).
template <class Spec>
class EncodedEpilogue {
  static constexpr Activation kActivation = Spec::kActivation;
  static constexpr int kHalves = is_gated(kActivation) ? 2 : 1;
  static constexpr int kPairs = kScaleBlock / 4;  // of a thread's elements: of two rows, two at a time
  static_assert(Spec::kColumns == kScaleBlock);
  using T = Element<product_format(Spec::kFormat)>;
  using Accumulator = float[kScaleBlock / 2];

 public:
  __device__ EncodedEpilogue(Args const& args, char* shared, int warpgroup, int thread)
      : args_(args),
        params_(args),
        piece_base_(cute::cast_smem_ptr_to_uint(shared) + (warpgroup * 4 + thread / 32) * kPieceBytes),
        warp_(thread / 32),
        lane_(thread % 32) {}

  // Stores one 64-row block of a tile: the codes, and the residual if it is kept. A gated activation has two accumulators.
  __device__ __forceinline__ void store_block(Accumulator const* acc, Work const& work, int block) const {
    const int first = block * kBlock + warp_ * kWarpRows, width = args_.problem.out_columns, columns = width - work.column;
    const int64_t row = work.row + first;
    const auto strip = [&](void* matrix, int halves, int half) {
      auto* start = static_cast<T*>(matrix) + row * halves * width + half * width + work.column;
      return Strip<T>(start, int64_t{halves} * width, work.valid - first, columns, lane_);
    };
    if (Spec::kResidual == Residual::kPre && args_.keep_residual) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        uint32_t pre[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) pre[i] = pack<T>(acc[half][2 * i], acc[half][2 * i + 1]);
        write(pre, strip(args_.out, kHalves, half));
      }
    }
    uint32_t hidden_pairs[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t gate = pack<T>(acc[0][2 * i], acc[0][2 * i + 1]);
      const uint32_t up = kHalves == 1 ? 0 : pack<T>(acc[kHalves - 1][2 * i], acc[kHalves - 1][2 * i + 1]);
      hidden_pairs[i] = hidden<T, kActivation>(gate, up, params_);
    }
    if (Spec::kResidual == Residual::kHidden && args_.keep_residual) write(hidden_pairs, strip(args_.hidden, 1, 0));
    // Behind the last gate lies the up half, whose products the gates' columns beyond the last then hold.
    if (kHalves > 1 && columns < kScaleBlock) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (i / 2 * 8 + lane_ % 4 * 2 >= columns) hidden_pairs[i] = 0;
      }
    }
    encode(hidden_pairs, work, first, columns);
  }

 private:
  // Pair i is in row 8 (i % 2) + lane / 4, at column 8 (i / 2) + 2 (lane % 4).
  __device__ __forceinline__ void encode(uint32_t const (&pairs)[kPairs], Work const& work, int first, int columns) const {
    uint32_t largest[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      // relu2 has no negative values.
      largest[i % 2] = __vmaxu2(largest[i % 2], kActivation == Activation::kRelu2 ? pairs[i] : pairs[i] & 0x7fff7fff);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        largest[half] = __vmaxu2(largest[half], __shfl_xor_sync(~0u, largest[half], other));
      }
    }
    // Odd lanes divide for the second row, because a division is long.
    const uint32_t own = lane_ % 2 == 0 ? largest[0] : largest[1];
    const uint32_t amax = max(own << 16, own & 0xffff0000u);  // the bits of a float32
    const float scale = formats::scale_of(amax, formats::kLeastOfRows, args_.power_of_two);
    const float inverse = formats::inverse_of(scale);
    const int row = first + lane_ / 4 + 8 * (lane_ % 2);
    if (lane_ % 4 < 2 && row < work.valid && columns > 0) {
      args_.code_scales[int64_t{work.column / kScaleBlock} * args_.problem.num_rows + work.row + row] = scale;
    }
    const float of_rows[2] = {__shfl_sync(~0u, inverse, lane_ / 4 * 4), __shfl_sync(~0u, inverse, lane_ / 4 * 4 + 1)};
    const Piece<uint8_t> piece(piece_base_, lane_);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint32_t fours[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first_pair = quarter * 8 + i / 2 * 4 + i % 2;
        const uint32_t low = pairs[first_pair], high = pairs[first_pair + 2];
        const float4 values = {__uint_as_float(low << 16), __uint_as_float(low & 0xffff0000u), __uint_as_float(high << 16),
                               __uint_as_float(high & 0xffff0000u)};
        fours[i] = formats::encode(values, of_rows[i % 2]);
      }
      piece.put(fours, quarter);
    }
    __syncwarp();
    uint8_t* to = args_.codes + int64_t{work.row + first} * args_.problem.out_columns + work.column;
    piece.write(Strip<uint8_t>(to, args_.problem.out_columns, work.valid - first, columns, lane_), 0);
    __syncwarp();
  }

  // Writes 128 columns in 16 bits.
  __device__ __forceinline__ void write(uint32_t const (&pairs)[kPairs], Strip<T> const& to) const {
    const Piece<T> piece(piece_base_, lane_);
#pragma unroll
    for (int c = 0; c < kScaleBlock / kBlock; ++c) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int at = c * 16 + quarter * 4;
        piece.put({pairs[at], pairs[at + 1], pairs[at + 2], pairs[at + 3]}, quarter);
      }
      __syncwarp();
      piece.write(to, c);
      __syncwarp();
    }
  }

  Args const& args_;
  ActivationParams params_;
  uint32_t piece_base_;
  int warp_, lane_;
};

}  // namespace latent_moe::sm90
