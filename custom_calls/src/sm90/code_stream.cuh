// The codes that a lane of a widening warp reads, step after step through all tiles of its block.
//
// Two warpgroups widen steps in turn, and their warps share the columns of a tile. A lane copies chunks of 16 bytes of codes,
// and the scales of these, to its own places of a ring in shared memory, some steps before it widens them. Neighbouring lanes
// copy one column's codes of a step. The copies are asynchronous: loads to registers would not do, because a warp waits for all
// of its loads where it waits for one. A lane reads only what it has copied, so it needs no barrier.
#pragma once

#include "common/schedule.cuh"
#include "sm90/instructions.cuh"
#include "sm90/widened.cuh"

namespace latent_moe::sm90 {

constexpr int kWideningGroups = 2;  // warpgroups
constexpr int kMostAhead = 4;       // steps that a warpgroup copies ahead of the one that it widens
constexpr int kCodeRingBytes = 40 * 1024;

template <Code C, bool Halves>
class CodeStream {
  static constexpr int kDepth = kBlock;                         // elements of a step
  static constexpr int kColumns = 32;                           // of a warp
  static constexpr int kLanes = kDepth / kChunkElements<C>;     // that share a column
  static constexpr int kApart = 32 / kLanes;                    // columns between a lane's columns
  static constexpr int kUnits = kChunkUnits<C>;
  static constexpr bool kIsBlock = C == Code::kE4m3;            // one scale for all columns of the warp
  static constexpr int kChunks = kColumns / kApart;             // of a lane in a step
  static constexpr int kScales = C == Code::kInt8 ? 0 : kIsBlock ? 1 : kChunks;
  static constexpr int kZeros = C == Code::kInt4 ? kChunks : 0;  // words that hold a zero point
  // Bytes of a warp's step in the ring.
  static constexpr int kBytes = kChunks * 32 * 16 + (kScales + kZeros) * 32 * 4;
  // Scales of 4-bit codes are narrower than the words that are copied. These bits say where in their words a step's lie.
  static constexpr int kPlaceBits = 4;

 public:
  static constexpr int kAhead = packing(C) == 1 ? 2 : C == Code::kInt4 ? 3 : kMostAhead;
  static_assert(kAhead <= kMostAhead && kWideningGroups * 4 * kAhead * kBytes <= kCodeRingBytes, "the steps fit the ring");
  static_assert(packing(C) == 1 || kChunks * 2 <= kPlaceBits);

  struct Step {
    uint4 codes[kChunks];
    uint32_t scales[kScales > 0 ? kScales : 1];
  };

  // `ring` is the address in shared memory of the rings of all warps of all groups.
  __device__ CodeStream(Weight const& weight, uint32_t ring, int group, int warp, int lane)
      : weight_(weight), ring_(ring + (group * 4 + warp) * kAhead * kBytes), warp_(warp), lane_(lane) {}

  // Whether all steps of the tile are copied.
  __device__ __forceinline__ bool ended() const { return steps_ == 0; }

  __device__ __forceinline__ void begin(Work const& work) {
    steps_ = work.steps;
    const int64_t matrix = Halves ? 2 * work.expert + warp_ / 2 : work.expert;
    const int first = work.column + (Halves ? warp_ % 2 : warp_) * kColumns, last = weight_.n - 1;
    const int column = first + lane_ / kLanes, place = lane_ % kLanes;
    k_ = place * kChunkElements<C>;
    // A lane beyond the last column reads the last one, and nothing of its product is stored.
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t row = matrix * weight_.n + min(column + i * kApart, last);
      codes_[i] = static_cast<uint8_t const*>(weight_.data) + row * (weight_.k / packing(C));
      if constexpr (packing(C) == 2) {
        const int64_t scale = row * (((weight_.k - 1) >> scale_shift()) + 1);
        scales_[i] = scale & ~int64_t{3}, odd_[i] = scale & 3;
      }
    }
    if constexpr (kIsBlock) {
      auto const* all = static_cast<uint8_t const*>(weight_.scales);
      scales_[0] = weight_.k_shift == kWholeAxis ? 0 : decode::scales_of<C>(weight_, matrix, min(column, last)) - all;
    }
  }

  // Begins to copy the next step to a buffer of the ring. Beyond the contracted axis codes and scales are 0, because zeros
  // of the rows need finite partners.
  __device__ __forceinline__ void read(int buffer) {
    --steps_;
    const uint32_t codes = ring_ + buffer * kBytes + lane_ * 16, scales = ring_ + buffer * kBytes + kChunks * 512 + lane_ * 4;
    const bool inside = k_ < weight_.k;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) copy_chunk(codes + i * 512, codes_[i] + (k_ / packing(C)), inside);
    auto const* all = static_cast<uint8_t const*>(weight_.scales);
    if constexpr (kIsBlock) {
      if (weight_.k_shift != kWholeAxis) copy_word(scales, all + scales_[0] + (k_ >> weight_.k_shift) * 4, inside);
    }
    if constexpr (packing(C) == 2) {
      places_ >>= kPlaceBits;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int at = odd_[i] + (k_ >> scale_shift());
        const int64_t word = scales_[i] + (at & ~3);
        if constexpr (C == Code::kMxfp4) {
          copy_word(scales + i * 128, all + word, inside);
        } else {
          copy_word(scales + i * 128, all + 2 * (scales_[i] + (at & ~1)), inside);
        }
        if constexpr (kZeros > 0) {
          auto const* zeros = static_cast<uint8_t const*>(weight_.more);
          if (zeros != nullptr) copy_word(scales + (kScales + i) * 128, zeros + word, inside);
        }
        places_ |= static_cast<uint32_t>(at & 3) << (kPlaceBits * (kAhead - 1) + 2 * i);
      }
    }
    k_ += kDepth;
  }

  // Takes the oldest step out of its buffer. Its copies have arrived.
  __device__ __forceinline__ void take(Step& step, int buffer) {
    const uint32_t codes = ring_ + buffer * kBytes + lane_ * 16, scales = ring_ + buffer * kBytes + kChunks * 512 + lane_ * 4;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) step.codes[i] = load_shared(codes + i * 512);
    if constexpr (kIsBlock) {
      step.scales[0] = weight_.k_shift == kWholeAxis ? __float_as_uint(1.0f) : load_shared_word(scales);
    }
    if constexpr (packing(C) == 2) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const uint32_t place = places_ >> 2 * i & 3, word = load_shared_word(scales + i * 128);
        if constexpr (C == Code::kMxfp4) {
          step.scales[i] = word >> 8 * place & 0xff;
        } else {
          step.scales[i] = word >> 16 * (place & 1) & 0xffff;
        }
        if constexpr (kZeros > 0) {
          const bool has = weight_.more != nullptr;
          step.scales[i] |= (has ? load_shared_word(scales + (kScales + i) * 128) >> 8 * place & 0xff : 8u) << 16;
        }
      }
    }
  }

  // Passes over the next step, which another warpgroup widens.
  __device__ __forceinline__ void pass() {
    --steps_;
    k_ += kDepth;
  }

  // Behind the last step, older ones move on in the record of places all the same.
  __device__ __forceinline__ void end() { places_ >>= kPlaceBits; }

  // Where this lane's first unit of a stage lies, in bytes: each column's row of 128 bytes is swizzled.
  __device__ __forceinline__ uint32_t place() const {
    const int row = warp_ * kColumns + lane_ / kLanes;
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

  // Elements that share a scale of narrow codes, as a power of 2. A chunk's two scales of nvfp4 count as one.
  __device__ __forceinline__ int scale_shift() const { return C == Code::kInt4 ? weight_.k_shift : 5; }

  Weight const& weight_;
  uint32_t ring_;
  int warp_, lane_;
  int steps_ = 0, k_ = 0;
  uint8_t const* codes_[kChunks];
  // Narrow codes: the number of a column's first scale, rounded down to a multiple of 4, and what is left. Scales of blocks: the
  // first one's place in bytes.
  int64_t scales_[kScales > 0 ? kScales : 1];
  int odd_[kScales > 0 ? kScales : 1];
  uint32_t places_ = 0;
};

}  // namespace latent_moe::sm90
