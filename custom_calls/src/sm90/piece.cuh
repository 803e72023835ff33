// Moves a warp's 16 rows of 64 columns between registers, shared memory and global memory.
#pragma once

#include "cutlass/arch/memory.h"
#include "sm90/instructions.cuh"
#include "sm90/spec.h"

namespace latent_moe::sm90 {

constexpr int kWarpRows = 16;
static_assert(kStoredRows == kWarpRows);
constexpr int kPieceBytes = kWarpRows * kRowBytes;  // a warp's part of a [64][64] block

// Sixteen rows of a matrix of 8-bit or 16-bit elements in memory. A lane moves 16 bytes of every fourth row. Elements beyond
// `rows` and `columns` are not touched.
template <class T>
struct Strip {
  static constexpr int kUnit = 16 / sizeof(T), kColumns = kRowBytes / sizeof(T);  // elements of 16 and of 128 bytes
  T* start;  // of this lane
  int64_t four_rows;
  int rows, columns;  // from there on

  __device__ __forceinline__ Strip(T* first, int64_t pitch, int rows, int columns, int lane)
      : start(first + lane / 8 * pitch + lane % 8 * kUnit),
        four_rows(4 * pitch),
        rows(rows - lane / 8),
        columns(columns - lane % 8 * kUnit) {}

  // The lane's i-th row, in the block of kColumns columns c.
  __device__ __forceinline__ T* at(int i, int c) const { return start + i * four_rows + c * kColumns; }
  __device__ __forceinline__ bool holds(int i, int c) const { return i * 4 < rows && c * kColumns < columns; }
};

// A warp's [16][64] elements of 16 bits, or [16][128] codes, in shared memory, swizzled so that no access has bank conflicts.
template <class T>
class Piece {
 public:
  __device__ Piece(uint32_t base, int lane)
      : by_quarter_(base + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4)),
        by_row_(base + lane / 8 * 128 + ((lane % 8 ^ lane / 8) << 4)) {}

  // The layout of a thread's elements after a product: in pairs, 16 columns (a quarter) at a time. Pair i is in row
  // 8 (i % 2) + lane / 4, at column 16 quarter + 8 (i / 2) + 2 (lane % 4). Codes come in fours, 32 columns at a time: the pairs at
  // columns 32 quarter + 16 (i / 2) + 2 (lane % 4) and 8 columns further.
  __device__ __forceinline__ void put(uint32_t const (&p)[4], int quarter) const {
    cute::SM90_U32x4_STSM_N::copy(p[0], p[1], p[2], p[3], *flipped(by_quarter_, quarter << 5));
  }
  __device__ __forceinline__ void get(uint32_t (&p)[4], int quarter) const {
    cute::SM75_U32x4_LDSM_N::copy(*flipped(by_quarter_, quarter << 5), p[0], p[1], p[2], p[3]);
  }

  // This lane's 16 bytes of its i-th row: those that it reads from memory and writes to it. Codes that were put are in the order
  // of `put`, and `write` brings them into that of the columns.
  __device__ __forceinline__ uint4 unit(int i) const { return reinterpret_cast<uint4 const&>(*row(i)); }

  // Writes to memory the elements that the whole warp has put.
  __device__ __forceinline__ void write(Strip<T> const& to, int c) const {
    uint4 units[kWarpRows / 4];
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) units[i] = sizeof(T) == 1 ? in_order(unit(i)) : unit(i);
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      cutlass::arch::global_store<uint4, sizeof(uint4)>(units[i], to.at(i, c), to.holds(i, c));
    }
  }

  // Starts to read from memory, for the whole warp. Rows and columns beyond the strip become zero.
  __device__ __forceinline__ void read(Strip<T> const& from, int c) const {
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const bool inside = from.holds(i, c);
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<cute::uint128_t const*>(inside ? from.at(i, c) : from.start), *row(i), inside);
    }
  }

 private:
  // Sixteen codes by column. The words have those at columns 0, 2, 4 and 6, each with its neighbour and the two behind 8 more.
  static __device__ __forceinline__ uint4 in_order(uint4 put) {
    return {__byte_perm(put.x, put.y, 0x5410), __byte_perm(put.z, put.w, 0x5410), __byte_perm(put.x, put.y, 0x7632),
            __byte_perm(put.z, put.w, 0x7632)};
  }

  // This lane's 16 bytes of row lane / 8 + 4 i.
  __device__ __forceinline__ cute::uint128_t* row(int i) const { return flipped(by_row_ + i * 4 * 128, i % 2 << 6); }

  // The swizzled address `bits` bytes further in the row, or four rows further on.
  static __device__ __forceinline__ cute::uint128_t* flipped(uint32_t place, uint32_t bits) {
    return static_cast<cute::uint128_t*>(__cvta_shared_to_generic(place ^ bits));
  }

  uint32_t by_quarter_, by_row_;  // addresses in shared memory
};

// Columns 64 c + 16 quarter ... of a thread's accumulators, rounded, as `Piece` puts them.
template <class T, int Size>
__device__ __forceinline__ void round(uint32_t (&p)[4], float const (&acc)[Size], int c, int quarter) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = c * 32 + quarter * 8 + 2 * i;
    p[i] = pack<T>(acc[at], acc[at + 1]);
  }
}

}  // namespace latent_moe::sm90
