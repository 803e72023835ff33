// The codes that a lane of a widening warp reads, step after step through all tiles of its block.
//
// A warp widens 32 columns of a tile. A lane reads chunks of 16 bytes, and neighbouring lanes read one column's codes of a
// step. They go straight to registers, some steps ahead of their use, and further lines are on their way to the L2 cache.
#pragma once

#include "common/schedule.cuh"
#include "sm90/instructions.cuh"
#include "sm90/widened.cuh"

namespace latent_moe::sm90 {

template <Code C, bool Halves>
class CodeStream {
  static constexpr int kDepth = kBlock;                         // elements of a step
  static constexpr int kStepBytes = kDepth / packing(C);        // of a column
  static constexpr int kLanes = kDepth / kChunkElements<C>;     // that share a column
  static constexpr int kApart = 32 / kLanes;                    // columns between a lane's columns
  static constexpr int kUnits = kChunkUnits<C>;
  static constexpr int kLine = 128, kLinesAhead = 2;
  static constexpr bool kIsBlock = C == Code::kE4m3;            // one scale for all columns of the warp

 public:
  static constexpr int kChunks = kLanes;                        // of a lane in a step
  static constexpr int kScales = C == Code::kInt8 ? 0 : kIsBlock ? 1 : kChunks;
  // Steps that are read ahead. A stream may wait for a tile while it still holds as many steps of earlier ones, so they must
  // be fewer than the tiles that a queue can hold (common/queue.cuh).
  static constexpr int kAhead = packing(C) == 2 ? 3 : 2;

  struct Step {
    bool holds;  // false behind the last tile
    uint4 codes[kChunks];
    uint32_t scales[kScales > 0 ? kScales : 1];
  };

  __device__ CodeStream(Weight const& weight, int warp, int lane) : weight_(weight), warp_(warp), lane_(lane) {}

  // Whether all steps of the tile are read.
  __device__ __forceinline__ bool ended() const { return steps_ == 0; }

  __device__ __forceinline__ void begin(Work const& work) {
    steps_ = work.steps;
    const int64_t matrix = Halves ? 2 * work.expert + warp_ / 2 : work.expert;
    const int first = work.column + (Halves ? warp_ % 2 : warp_) * 32, last = weight_.n - 1;
    const int column = first + lane_ / kLanes, place = lane_ % kLanes;
    k_ = place * kChunkElements<C>;
    const auto row = [&](int at) {
      return static_cast<uint8_t const*>(weight_.data) + (matrix * weight_.n + min(at, last)) * (weight_.k / packing(C));
    };
    // A lane beyond the last column reads the last one, and nothing of its product is stored.
#pragma unroll
    for (int i = 0; i < kChunks; ++i) codes_[i] = row(column + i * kApart) + place * 16;
#pragma unroll
    for (int i = 0; i < kScales; ++i) scales_[i] = decode::scales_of<C>(weight_, matrix, min(column + i * kApart, last));
    line_ = row(first + lane_), line_end_ = line_ + weight_.k / packing(C);
#pragma unroll
    for (int i = 0; i < kLinesAhead; ++i) next_line();
    in_line_ = 0;
  }

  // Reads the next step. Beyond the contracted axis codes and scales are 0, because zeros of the rows need finite partners.
  __device__ __forceinline__ void read(Step& step) {
    --steps_;
    if (in_line_ == 0) next_line();
    in_line_ = (in_line_ + kStepBytes) % kLine;
    const bool inside = k_ < weight_.k;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      step.codes[i] = make_uint4(0, 0, 0, 0);
      if (inside) step.codes[i] = decode::load_along(codes_[i]);
      codes_[i] += kStepBytes;
    }
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      step.scales[i] = kIsBlock && weight_.k_shift == kWholeAxis ? __float_as_uint(1.0f) : 0;
      if (inside && !(kIsBlock && weight_.k_shift == kWholeAxis)) {
        step.scales[i] = decode::Chunk<C, 1>::scale(weight_, scales_[i] + (k_ >> weight_.k_shift) * decode::kScaleBytes<C>);
      }
    }
    k_ += kDepth;
  }

  // Where this lane's first unit of a stage lies, in bytes: each column's row of 128 bytes is swizzled.
  __device__ __forceinline__ uint32_t place() const {
    const int row = warp_ * 32 + lane_ / kLanes;
    return row * kRowBytes + ((lane_ % kLanes * kUnits ^ row % 8) << 4);
  }

  // Widens a step. `to` is the address in shared memory of this lane's first unit. The whole warp calls it.
  static __device__ __forceinline__ void store(Step const& step, uint32_t to) {
    bool takes_two = false;
    if constexpr (C == Code::kMxfp4) {
      takes_two = __ballot_sync(~0u, max(step.scales[0], step.scales[kScales - 1]) > decode::Widen<C>::kMost) != 0;
    }
    if (takes_two) {
      store(step, to, std::true_type{});
    } else {
      store(step, to, std::false_type{});
    }
  }

 private:
  template <class TakesTwo>
  static __device__ __forceinline__ void store(Step const& step, uint32_t to, TakesTwo) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      uint4 units[kUnits];
      widen<C>(units, step.codes[i], step.scales[kScales > 1 ? i : 0], TakesTwo::value);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        store_shared((to ^ unit << 4) + i * kApart * kRowBytes, units[unit]);
      }
    }
  }

  __device__ __forceinline__ void next_line() {
    if (line_ < line_end_) decode::prefetch_line(line_);
    line_ += kLine;
  }

  Weight const& weight_;
  int warp_, lane_;
  int steps_ = 0, k_ = 0, in_line_ = 0;
  uint8_t const* codes_[kChunks];
  uint8_t const* scales_[kScales > 0 ? kScales : 1];
  uint8_t const *line_, *line_end_;
};

}  // namespace latent_moe::sm90
