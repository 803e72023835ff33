// The scales of a warp's unit in shared memory.
//
// A unit has 16 features. The scales of 8 neighbours are contiguous in memory. A warp copies them in pieces of 16 bytes while it
// multiplies the unit before. A lane reads a scale from there when it needs it, so no register holds a scale that is on its way.
// Loads of single bytes from global memory were slower: the L1 cache lost their lines before all bytes were read.
#pragma once

#include "common/device.cuh"
#include "decode/listed.h"

namespace latent_moe::decode {

// Codes whose scales are single bytes, one or two for the 32 codes of a lane.
template <Code C>
constexpr bool kHasUnitScales = C == Code::kMxfp4 || C == Code::kNvfp4;

// Whether the scales of each unit start at a multiple of 16 bytes and have a multiple of 16 bytes.
inline bool are_pieces(Weight const& weight) {
  const int row = ((weight.k - 1) >> weight.k_shift) + 1, features = 16 / weight.parts;
  const bool is_aligned = reinterpret_cast<uintptr_t>(weight.scales) % 16 == 0;
  return is_aligned && weight.n % features == 0 && features * row % 16 == 0;
}

// Rows of 32, 64, .. bytes would start in the same banks, so there is a gap behind each of them.
inline UnitScales unit_scales(Weight const& weight, int rows_bytes) {
  const int row = ((weight.k - 1) >> weight.k_shift) + 1;
  for (int shift = 5; shift < 31; ++shift) {
    if (row == 1 << shift) return {rows_bytes, row + 16, 8 * row, shift};
  }
  return {rows_bytes, row, 8 * row, 31};
}

// The bytes up to the end of the scales of two units of each warp, the present one and the next one.
inline int bytes_with(UnitScales const& scales, int warps) { return scales.begin + warps * 2 * 16 * scales.row; }

// The scales of a warp's unit. Those of every second unit are in the same place.
__device__ inline uint8_t* scales_of_unit(void* memory, UnitScales const& scales, int warp, int unit) {
  return static_cast<uint8_t*>(memory) + scales.begin + (warp * 2 + unit % 2) * 16 * scales.row;
}

// Begins to copy a unit's scales, of which the second 8 features are so many bytes behind the first 8. The whole warp calls it.
__device__ inline void copy_scales(uint8_t* to, uint8_t const* from, UnitScales const& scales, int64_t apart) {
#pragma unroll 1
  for (int at = int(threadIdx.x) % 32 * 16; at < 2 * scales.half; at += 32 * 16) {
    copy_ahead(to + at + (at >> scales.gap_shift) * 16, from + at + (at < scales.half ? 0 : apart - scales.half));
  }
}

// Whether one of a unit's scales is above 128: its upper bit and another one are set. Each lane looks at what it has copied.
__device__ inline bool has_scales_above_128(uint8_t const* of_unit, UnitScales const& scales) {
  uint32_t above = 0;
#pragma unroll 1
  for (int at = int(threadIdx.x) % 32 * 16; at < 2 * scales.half; at += 32 * 16) {
    const uint4 piece = *reinterpret_cast<uint4 const*>(of_unit + at + (at >> scales.gap_shift) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = (&piece.x)[i];
      above |= ((word & 0x7f7f7f7f) + 0x7f7f7f7f) & word;
    }
  }
  return __ballot_sync(~0u, (above & 0x80808080) != 0) != 0;
}

}  // namespace latent_moe::decode
