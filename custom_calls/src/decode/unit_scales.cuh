// The scales of a warp's unit in shared memory.
//
// A unit has 16 features. The scales of 8 neighbours are contiguous in memory, so a warp copies them in pieces of 16 bytes while
// it multiplies the unit before. A lane then reads a scale when it needs it: no register holds it meanwhile, and global memory is
// read once, whatever the L1 cache keeps.
#pragma once

#include "common/device.cuh"
#include "decode/listed.h"

namespace latent_moe::decode {

// Codes with one or two scales of a byte for the 32 codes of a lane.
template <Code C>
constexpr bool kHasUnitScales = C == Code::kMxfp4 || C == Code::kNvfp4;

// Bytes of a feature's scales.
__host__ __device__ inline int scales_row_of(Weight const& weight) { return ((weight.k - 1) >> weight.k_shift) + 1; }

// Whether the scales of all units are pieces of 16 bytes.
inline bool are_pieces(Weight const& weight) {
  const int row = scales_row_of(weight), features = 16 / weight.parts;
  const bool is_aligned = reinterpret_cast<uintptr_t>(weight.scales) % 16 == 0;
  return is_aligned && weight.n % features == 0 && features * row % 16 == 0;
}

// Sets how scales lie in shared memory. Rows of 32, 64, .. bytes would start in the same banks, so 16 bytes are left out behind
// each of them.
inline void lay_out_unit_scales(Listed& listed) {
  const int row = scales_row_of(listed.product.weight);
  listed.scales_row = row, listed.scales_gap_shift = 31;
  for (int shift = 5; shift < 31; ++shift) {
    if (row == 1 << shift) listed.scales_row = row + 16, listed.scales_gap_shift = shift;
  }
}

// Bytes of the scales of the present unit and of the next one, for so many warps.
inline int unit_scales_bytes(Listed const& listed, int warps) { return warps * 2 * 16 * listed.scales_row; }

// The scales of a unit of a warp: those of every second unit are in the same place.
__device__ inline uint8_t* unit_scales(void* memory, Listed const& listed, int warp, int unit) {
  return static_cast<uint8_t*>(memory) + (warp * 2 + unit % 2) * 16 * listed.scales_row;
}

// Begins to copy a unit's scales. The whole warp calls it with the scales of the first feature.
__device__ inline void copy_unit_scales(uint8_t* to, uint8_t const* from, Listed const& listed) {
  const int half = 8 * scales_row_of(listed.product.weight);
  const int64_t gap = listed.scales_apart - half;  // between features 7 and 8, in global memory
#pragma unroll 1
  for (int at = int(threadIdx.x) % 32 * 16; at < 2 * half; at += 32 * 16) {
    copy_ahead(to + at + (at >> listed.scales_gap_shift) * 16, from + at + (at < half ? 0 : gap));
  }
}

// Whether one of a unit's scales is above 128: its upper bit and another one are set. Each lane looks at what it has copied.
__device__ inline bool has_scales_above_128(uint8_t const* scales, Listed const& listed) {
  const int bytes = 16 * scales_row_of(listed.product.weight);
  uint32_t above = 0;
#pragma unroll 1
  for (int at = int(threadIdx.x) % 32 * 16; at < bytes; at += 32 * 16) {
    const uint4 piece = *reinterpret_cast<uint4 const*>(scales + at + (at >> listed.scales_gap_shift) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = (&piece.x)[i];
      above |= ((word & 0x7f7f7f7f) + 0x7f7f7f7f) & word;
    }
  }
  return __ballot_sync(~0u, (above & 0x80808080) != 0) != 0;
}

}  // namespace latent_moe::decode
