// The share of a persistent block in the work of a product of listed rows.
//
// An expert's rows make passes of at most `pass` rows. A pass has a unit for each tile of columns. The units of all passes lie
// in a row, and each block has a part of them. Parts differ by at most one unit. Those of the second product may begin and end within
// a unit, along the contracted axis (Osama et al. 2023, Stream-K). Two blocks then have a piece each.
#pragma once

#include "common/device.cuh"
#include "decode/listed.h"

namespace latent_moe::decode {

// A unit: a tile of an expert, times the rows of the list from `row` on; the expert's rows end at `end`. The block has the elements
// first ... last - 1 of the contracted axis.
struct Unit {
  int expert, row, end, tile, first, last;
};

// Goes on to the next tile. There must be one. Returns whether it has other rows.
__device__ __forceinline__ bool advance(Unit& unit, Listed const& listed, int tiles, int pass) {
  if (++unit.tile < tiles) return false;
  unit.tile = 0, unit.row += pass;
  if (unit.row >= unit.end) {
    unit.row = unit.end;
    do {
      unit.end = listed.starts[++unit.expert + 1];
    } while (unit.end == unit.row);
  }
  return true;
}

// The share of a block: the number of its units, the first one, and where the last one ends along the contracted axis.
struct Share {
  int units;
  Unit first;
  int last;
};

// Finds the share of the block. A unit may be cut at multiples of `round`. If `round` is k, no unit is cut. Every thread of so many
// calls it.
template <int Threads>
__device__ Share share_of_block(Listed const& listed, int tiles, int pass, int round) {
  constexpr int kWarps = Threads / 32;
  __shared__ int sums[kWarps];
  __shared__ Unit found;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, experts = listed.product.experts;
  // Each thread counts the passes of some experts, and of those before them.
  const int each = ceil_div(experts, Threads), first = min(int(threadIdx.x) * each, experts), last = min(first + each, experts);
  int passes = 0;
#pragma unroll 1
  for (int e = first; e < last; ++e) passes += ceil_div(listed.starts[e + 1] - listed.starts[e], pass);
  int before = passes;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int lower = __shfl_up_sync(~0u, before, lanes);
    if (lane >= lanes) before += lower;
  }
  if (lane == 31) sums[warp] = before;
  before -= passes;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? sums[w] : 0;
    total += sums[w];
  }
  // Blocks that share an SM have neighbouring parts, so that each SM has equally much.
  const int layers = gridDim.x / listed.num_sms, index = blockIdx.x % listed.num_sms * layers + blockIdx.x / listed.num_sms;
  const int units = total * tiles, blocks = gridDim.x, k = listed.product.weight.k;
  // If blocks had less than a unit, a unit could be cut twice.
  if (units < blocks) round = k;
  const int rounds = ceil_div(k, round);
  struct Place {
    int unit, element;
  };
  auto const begin_of = [&](int index) {
    const int64_t before = int64_t{units} * index;
    const int unit = before / blocks, rest = before - int64_t{unit} * blocks;  // earlier blocks have rest / blocks of this unit
    return Place{unit, rest * rounds / blocks * round};
  };
  const Place begin = begin_of(index), end = begin_of(index + 1);
  Share share = {end.unit - begin.unit + (end.element > 0), {}, end.element > 0 ? end.element : k};
  int skipped = begin.unit / tiles - before;  // passes
  if (share.units > 0 && skipped >= 0 && skipped < passes) {
    int expert = first;
    for (;; ++expert) {
      const int own = ceil_div(listed.starts[expert + 1] - listed.starts[expert], pass);
      if (skipped < own) break;
      skipped -= own;
    }
    found = {expert, listed.starts[expert] + skipped * pass, listed.starts[expert + 1], begin.unit % tiles};
  }
  __syncthreads();
  share.first = found;
  share.first.first = begin.element;
  share.first.last = k;  // a block with a piece of a unit has another unit too
  return share;
}

}  // namespace latent_moe::decode
