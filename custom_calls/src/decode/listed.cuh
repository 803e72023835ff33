// What a block does in both products of listed rows.
//
// Blocks are persistent. A warp has 16 columns of each tile, or 8 of the gate and the same 8 of the up half. It reads codes as
// a stream: the next unit's codes are asked for while the last ones of a unit are multiplied. No warp waits for another one while
// the rows stay the same. Rows are in shared memory, and stay there for all tiles of a pass if they fit. Scales come as codes do,
// or by shared memory (unit_scales.cuh).
//
// Each kernel is launched when the blocks of the one before have begun. It reads the weights' codes before it waits.
#pragma once

#include "decode/activation.cuh"
#include "decode/chunk.cuh"
#include "decode/lists.cuh"
#include "decode/share.cuh"
#include "decode/unit_scales.cuh"

namespace latent_moe::decode {

// Pass: the rows of a pass, 8 or 16. Threads: of a block. Staged: whether scales are in shared memory.
template <Code C, int Pass, int Threads, bool Staged>
struct Stream {
  static constexpr int kGroups = Pass / 8, kAhead = Pass == 8 ? 2 : 4;
  static constexpr int kThreads = Threads, kWarps = Threads / 32;
  static constexpr int kBlocks = (Pass == 8 ? 1024 : 512) / Threads;  // of an SM
  using Lane = Chunk<C, kGroups>;
  static constexpr int kRound = kAhead * Lane::kStep;  // elements that a warp asks for ahead
  static constexpr int kPanel = 3072;                  // the most elements of the rows in shared memory at a time
  static_assert(kPanel % kRound == 0);
  static constexpr int kColumns = 20;  // from a row of the sums to the next one, so that lanes use other banks

  // Bytes of rows in shared memory for k elements.
  static constexpr int rows_bytes(int k) { return ceil_div(min(k, kPanel), Lane::kStep) * Lane::kStep * Pass * 2; }

  struct Shared {
    alignas(8) float sums[kWarps][Pass][kColumns];
    int assignments[Pass], sources[Pass];  // sources: where the rows come from
    float weights[Pass];
    Unit units[kWarps][2];  // of each warp, the present one and the next one
    int last;               // where the block's last unit ends along the contracted axis
  };

  Listed const& listed;
  Product const& product;
  Weight const& weight;
  Shared& shared;
  uint4* rows;  // [step][unit of 8 elements][row][lane], and then units' scales
  int lane, warp, place, width, tiles;

  __device__ Stream(Listed const& given, Shared& memory)
      : listed(given),
        product(given.product),
        weight(given.product.weight),
        shared(memory),
        rows(dynamic_shared()),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        place(lane % 4),
        width(16 / weight.parts),
        tiles(ceil_div(weight.n * weight.parts, 16 * kWarps)) {}

  __device__ bool is_first() const { return product.choice_weights == nullptr; }

  // The codes of a lane's first feature from the next element on, and their scales. Those of its second feature are further
  // by the same distance in all units. Scales in shared memory are those of the next element to multiply.
  uint8_t const *codes, *scales;
  int left;  // elements from there to the end; 0 if there is nothing to load
  uint4 loaded[kAhead][2];
  uint32_t found[Staged ? 1 : kAhead][2];
  bool takes_two = false;  // whether a unit's staged scales take two factors

  // The unit behind which there are so many more. Registers are for codes, so units are in shared memory.
  __device__ Unit& unit(int more) const { return shared.units[warp][more % 2]; }

  __device__ int first_feature(int tile) const { return (tile * kWarps + warp) * width; }

  __device__ uint8_t* staged_scales(int more) const { return scales_of_unit(rows, listed.unit_scales, warp, more); }

  // Points at the first codes of the unit behind which there are so many more, and at their scales or copies all of them.
  __device__ void point_at(int more) {
    Unit const& unit = this->unit(more);
    const int first = first_feature(unit.tile), feature = first + lane / 4;
    left = feature < weight.n ? unit.last - unit.first : 0;
    if (left == 0) return;
    const int matrix = unit.expert * weight.parts;
    const int64_t row = int64_t{matrix} * weight.n + first;
    codes = static_cast<uint8_t const*>(weight.data) + row * (weight.k / Lane::kPacking);
    codes += (lane / 4 * weight.k + unit.first + place * Lane::kSize) / Lane::kPacking;
    if constexpr (Staged) {
      // 8 features have `half` bytes of scales, and `first` is a multiple of 8.
      auto const* from = static_cast<uint8_t const*>(weight.scales) + row / 8 * listed.unit_scales.half;
      copy_scales(staged_scales(more), from, listed.unit_scales, listed.scales_apart);
    } else {
      scales = scales_of<C>(weight, matrix, feature);
      // A scale of the sums applies to all elements of the step, including those of other lanes.
      scales += scales_before<C>(weight, unit.first + (Lane::kPacking == 2 ? place * Lane::kSize : 0));
    }
  }

  // Waits for the scales of a unit that the warp has pointed at.
  __device__ void take_scales(int more) {
    wait_for_copies();
    if constexpr (C == Code::kMxfp4) takes_two = has_scales_above_128(staged_scales(more), listed.unit_scales);
    __syncwarp();
    scales = staged_scales(more) + lane / 4 * listed.unit_scales.row;
    scales += scales_before<C>(weight, unit(more).first + place * Lane::kSize);
  }

  // Loads a step of the next round, all of which exists if it is whole. Beyond the end, codes and their scales are 0, as the
  // rows are.
  template <bool Whole>
  __device__ void load(int step) {
    const int begin = step * Lane::kStep;
    if (!Whole && begin >= left) return;
    const bool inside = Whole || begin + place * Lane::kSize < left;
    auto const* from = codes + begin / Lane::kPacking;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (!Staged) find_scale(step, i, begin, listed.scales_apart, inside);
      loaded[step][i] = inside ? load_along(from + i * listed.codes_apart) : uint4{};
    }
  }

  // Reads the scale of an element and of one of a lane's features, which are so many bytes apart.
  __device__ void find_scale(int to, int i, int element, int64_t apart, bool inside) {
    auto const* at = scales + scales_before<C>(weight, element) + i * apart;
    found[to][i] = inside || Lane::kPacking == 1 ? Lane::scale(weight, at) : 0;
  }

  __device__ void next_round() {
    codes += kRound / Lane::kPacking;
    if constexpr (!Staged) scales += scales_before<C>(weight, kRound);
    left -= kRound;
  }

  // Stores the rows' elements from `panel` on, in the order of the codes, and zeros up to the end of the last step.
  __device__ void store_rows(Unit const& unit, int panel) {
    constexpr int kAtOnce = 4;  // rows that are loaded before they are stored
    const int count = min(unit.end - unit.row, Pass), mine = threadIdx.x;
    __syncthreads();
    if (mine < count) {
      const int assignment = listed.list[unit.row + mine];
      shared.assignments[mine] = assignment;
      shared.sources[mine] = is_first() ? assignment / product.choices : unit.row + mine;
      shared.weights[mine] = is_first() ? 0.0f : product.choice_weights[assignment];
    }
    __syncthreads();
    auto const* from = static_cast<__nv_bfloat16 const*>(product.rows);
    const int end = min(weight.k - panel, kPanel);
#pragma unroll 1
    for (int at = mine; at < ceil_div(end, Lane::kStep) * (Lane::kStep / 8); at += kThreads) {
      // Neighbouring threads have other lanes' units, as they lie side by side in shared memory.
      const int lanes = at % 4, piece = at / 4 % Lane::kUnits, step = at / (4 * Lane::kUnits);
      const int k = step * Lane::kStep + lanes * Lane::kSize + piece * 8;
#pragma unroll 1
      for (int some = 0; some < count; some += kAtOnce) {
        uint4 elements[kAtOnce] = {};
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const int64_t row = int64_t{shared.sources[min(some + r, count - 1)]} * weight.k + panel + k;
          if (k < end) elements[r] = __ldcg(reinterpret_cast<uint4 const*>(from + row));
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          uint4* chunk = rows + (step * Lane::kUnits * Pass + some + r) * 4 + lanes;
          if (some + r < count) Widen<C>::store(chunk, piece, Lane::kApart, elements[r]);
        }
      }
    }
    __syncthreads();
  }

  // Stores the sums of a unit: hidden elements, or weighted parts. A whole unit stores zeros as its second piece.
  __device__ void store(float (&totals)[kGroups][4], Unit const& unit) {
    const int feature = first_feature(unit.tile), count = min(unit.end - unit.row, Pass);
    float(&sums)[Pass][kColumns] = shared.sums[warp];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = Lane::left(weight, int64_t{unit.expert} * weight.parts + (weight.parts == 2 ? i : 0));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        sums[8 * g + 2 * place][lane / 4 + 8 * i] = scale * totals[g][2 * i];
        sums[8 * g + 2 * place + 1][lane / 4 + 8 * i] = scale * totals[g][2 * i + 1];
      }
    }
    __syncwarp();
    // A lane has two neighbouring columns.
    const int shift = weight.parts == 2 ? 2 : 3;
#pragma unroll 1
    for (int i = lane; i < count << shift; i += 32) {
      const int row = i >> shift, column = 2 * (i & ((1 << shift) - 1));
      float2 value = *reinterpret_cast<float2 const*>(&sums[row][column]);
      if (is_first()) {
        value = {of_gate(product.activation, value.x, product.beta), of_gate(product.activation, value.y, product.beta)};
        if (weight.parts == 2) {
          const float2 up = *reinterpret_cast<float2 const*>(&sums[row][column + 8]);
          value.x *= of_up(product.activation, up.x, product.linear_beta);
          value.y *= of_up(product.activation, up.y, product.linear_beta);
        }
        const int64_t at = int64_t{unit.row + row} * weight.n + feature + column;
        auto* hidden = static_cast<__nv_bfloat16*>(product.hidden) + at;
        *reinterpret_cast<__nv_bfloat162*>(hidden) = __floats2bfloat162_rn(value.x, value.y);
      } else {
        const int piece = unit.first > 0;
        const int64_t at = int64_t{shared.assignments[row] * kPieces + piece} * weight.n + feature + column;
        const float factor = shared.weights[row];
        *reinterpret_cast<float2*>(product.partial + at) = {factor * value.x, factor * value.y};
        const bool is_whole = piece == 0 && unit.last == weight.k;
        if (is_whole) *reinterpret_cast<float2*>(product.partial + at + weight.n) = {0.0f, 0.0f};
      }
    }
    __syncwarp();
  }

  // Multiplies a round, which has so many elements, and loads the next one. Both have all elements if they are whole.
  template <bool Whole>
  __device__ void multiply_round(float (&totals)[kGroups][4], uint4 const* (&elements)[kGroups], int count) {
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      uint4 const* mine[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) mine[g] = elements[g] + step * Lane::kUnits * Lane::kApart;
      const int begin = step * Lane::kStep;
      if (Whole || begin < count) {
        if constexpr (Staged) {
          const bool inside = Whole || begin + place * Lane::kSize < count;
#pragma unroll
          for (int i = 0; i < 2; ++i) find_scale(0, i, begin, 8 * listed.unit_scales.row, inside);
        }
        auto const& scale = found[Staged ? 0 : step];
        Lane::add(totals, loaded[step], scale, mine, Staged ? takes_two : Lane::takes_two(scale));
      }
      load<Whole>(step);
    }
    if (Whole || left > 0) next_round();
    if constexpr (Staged) scales += scales_before<C>(weight, kRound);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) elements[g] += kAhead * Lane::kUnits * Lane::kApart;
  }

  __device__ void run() {
    if (is_first()) cudaGridDependencySynchronize();  // the lists are there
    cudaTriggerProgrammaticLaunchCompletion();
    const Share share = share_of_block<Threads>(listed, tiles, Pass, is_first() ? weight.k : kRound);
    int more = share.units - 1;
    if (more < 0) {
      // Without this wait the product could end before the first one, and the next kernel would begin too early.
      if (!is_first()) cudaGridDependencySynchronize();
      return;
    }
    unit(more) = share.first;
    shared.last = share.last;
    point_at(more);
#pragma unroll
    for (int step = 0; step < kAhead; ++step) load<false>(step);
    if (left > 0) next_round();
    if (!is_first()) cudaGridDependencySynchronize();  // the hidden rows are there
    uint4 const* of_rows[kGroups];
    for (bool has_other_rows = true; more >= 0; --more) {
      const bool is_busy = first_feature(unit(more).tile) < weight.n;
      if constexpr (Staged) take_scales(more);
      float totals[kGroups][4] = {};
      uint4 const* elements[kGroups];
      const int first = unit(more).first, last = unit(more).last;
      for (int start = first; start < last; start += kRound) {
        const int in_panel = start % kPanel;
        if (start == first || in_panel == 0) {
          if (has_other_rows || weight.k > kPanel) {
            store_rows(unit(more), start - in_panel);
            // A lane beyond the last row reads the last one again, unused.
            const int last_row = min(unit(more).end - unit(more).row, Pass) - 1;
#pragma unroll
            for (int g = 0; g < kGroups; ++g) of_rows[g] = rows + min(8 * g + lane / 4, last_row) * 4 + place;
          }
#pragma unroll
          for (int g = 0; g < kGroups; ++g) elements[g] = of_rows[g] + in_panel / Lane::kStep * Lane::kUnits * Lane::kApart;
        }
        const int end = min(last, start - in_panel + kPanel) - kRound;
        for (; left >= kRound && start < end; start += kRound) multiply_round<true>(totals, elements, 0);
        // The last round of a unit, or one behind which there is no whole one, or other rows.
        if (start + kRound >= last) {
          left = 0;
          if (more > 0) has_other_rows = go_on(more);
        }
        if (Staged && is_busy && start + kRound == last && left >= kRound) {
          multiply_round<true>(totals, elements, 0);
        } else {
          multiply_round<false>(totals, elements, is_busy ? last - start : 0);
        }
      }
      if (is_busy) store(totals, unit(more));
    }
  }

  // Points at the unit behind this one. Returns whether it has other rows.
  __device__ bool go_on(int more) {
    Unit next = unit(more);
    const bool has_other_rows = advance(next, listed, tiles, Pass);
    next.first = 0, next.last = more == 1 ? shared.last : weight.k;
    unit(more - 1) = next;
    point_at(more - 1);
    return has_other_rows;
  }
};

}  // namespace latent_moe::decode
