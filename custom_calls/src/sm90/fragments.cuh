// A thread's part of a weight in codes, widened in registers as the first operand of products.
//
// For 16 elements k of the contracted axis, a thread of wgmma holds those at 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of two rows of
// the operand, q = thread % 4. The rows are features of the weight, any two will do: neighbours by 8, or a gate and its up
// half. TMA has copied 128 bytes of codes of each feature to a swizzled row of a stage. Scales come from memory, a step
// ahead. A step is 128 elements, and a part of it 32.
#pragma once

#include "sm90/instructions.cuh"
#include "sm90/widened.cuh"

namespace latent_moe::sm90 {

constexpr int kParts = 4;  // of a step
constexpr int kPartElements = 32;
constexpr int kStepElements = kParts * kPartElements;

// Bytes of codes of a feature in a stage are those of so many steps.
template <Code C>
constexpr int kStageSteps = packing(C);

// The operand of the products with 16 elements each of a part.
using Fragment = uint32_t[kPartElements / 16][4];

// A tile has so many features, in a gated one half gates, half up. A thread's two features are then a gate and its up half.
template <Code C, bool Halves, int Features>
class Fragments {
  using Widen = decode::Widen<C>;
  static constexpr bool kPacks = packing(C) == 2;
  // Words of scales of a feature in a step: in memory, where they begin at any byte of the first one, and in order. The zero
  // points of int4 follow.
  static constexpr int kScaleWords = C == Code::kMxfp4 ? 1 : C == Code::kNvfp4 || C == Code::kInt4 ? 2 : 0;
  static constexpr int kRawScales = kPacks ? kScaleWords + 1 : C == Code::kE4m3 ? 1 : 0;
  static constexpr int kRawZeros = C == Code::kInt4 ? 2 : 0;
  static constexpr int kRaw = kRawScales + kRawZeros > 0 ? kRawScales + kRawZeros : 1;
  static constexpr int kWords = C == Code::kInt4 ? 3 : kScaleWords > 0 ? kScaleWords : 1;

 public:
  static constexpr bool kScalesSums = C != Code::kMxfp4 && C != Code::kInt4;

  __device__ Fragments(Weight const& weight, int warpgroup, int thread) : weight_(weight), first_(warpgroup * (Halves ? 32 : 64)) {
    const int warp = thread / 32, in_eight = thread % 32 / 4, quarter = thread % 4;
    feature_ = first_ + warp * (Halves ? 8 : 16) + in_eight;
    place_ = feature_ * kRowBytes + (in_eight << 4) + (kPacks ? 0 : quarter / 2 * 4);
    if constexpr (C == Code::kInt8) {
      choice_ = quarter % 2 ? 0x3322 : 0x1100;
    } else {
      choice_ = kPacks ? 0x40 + 0x11 * quarter : quarter % 2 ? 0x7632 : 0x5410;
    }
  }

  // Begins a tile of an expert from a column on: reads the scales of sums, and those of the first step.
  __device__ __forceinline__ void begin(int expert, int column) {
    idle_ = column + first_ >= weight_.n;
    if (idle_) return;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int64_t matrix = Halves ? 2 * int64_t{expert} + f : expert;
      // A thread beyond the last column reads the last one, and nothing of its product is stored.
      const int own = min(column + feature_ + (Halves ? 0 : 8 * f), weight_.n - 1);
      if constexpr (kScalesSums) of_sums_[f] = scale_of_sum(weight_, matrix, own);
      if constexpr (kPacks) {
        const int64_t first = (matrix * weight_.n + own) * blocks();
        scales_[f] = words(weight_.scales, first * decode::kScaleBytes<C>, scales_at_[f]);
        if constexpr (C == Code::kInt4) zeros_[f] = words(weight_.more, first, zeros_at_[f]);
      } else if constexpr (C == Code::kE4m3) {
        if (weight_.k_shift != kWholeAxis) {
          scales_[f] = reinterpret_cast<uint32_t const*>(decode::scales_of<C>(weight_, matrix, own));
        }
      }
    }
    load(0);
  }

  // Whether all features of the tile lie beyond the last one, in all threads of the warpgroup.
  __device__ __forceinline__ bool is_idle() const { return idle_; }

  __device__ __forceinline__ float of_sum(int f) const { return of_sums_[f]; }

  // Takes the scales of a step, and begins to read those of the next one. Behind the contracted axis scales are 0, because zeros
  // of the rows need finite partners.
  __device__ __forceinline__ void take(int step) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if constexpr (C == Code::kMxfp4 || C == Code::kNvfp4) {
        const uint32_t from = from_byte(scales_at_[f]);
#pragma unroll
        for (int i = 0; i < kScaleWords; ++i) now_[f][i] = decode::permuted(raw_[f][i], raw_[f][i + 1], from);
      } else if constexpr (C == Code::kInt4) {
        if (weight_.k_shift == 5) {
          const uint32_t from = from_byte(scales_at_[f]);
          now_[f][0] = decode::permuted(raw_[f][0], raw_[f][1], from);
          now_[f][1] = decode::permuted(raw_[f][1], raw_[f][2], from);
          now_[f][2] = decode::permuted(raw_[f][3], raw_[f][4], from_byte(zeros_at_[f]));
        } else {
          const uint32_t scale = (scales_at_[f] + 2 * step) % 4, zero = (zeros_at_[f] + step) % 4;
          now_[f][0] = now_[f][1] = decode::permuted(raw_[f][0], 0, scale == 0 ? 0x1010 : 0x3232);
          now_[f][2] = decode::permuted(raw_[f][3], 0, 0x1111 * zero);
        }
        if (weight_.more == nullptr) now_[f][2] = 0x08080808;
      } else {
        now_[f][0] = raw_[f][0];
      }
    }
    if constexpr (kPacks) {
      if (const int left = (weight_.k - step * kStepElements) / 32; left < kStepElements / 32) clear_behind(left);
      special_ = false;
      if constexpr (C != Code::kInt4) {
        uint32_t special = 0;
#pragma unroll
        for (int i = 0; i < 2 * kScaleWords; ++i) special |= is_special(now_[i % 2][i / 2]);
        special_ = __any_sync(~0u, special != 0);
      }
      if constexpr (C == Code::kMxfp4) {
        if (special_) split_scales();
      }
    }
    if (step * kStepElements + kStepElements < weight_.k) load(step + 1);
  }

  // Widens a part of a step, out of a stage at an address in shared memory. The step is the `of_stage`-th one there.
  __device__ __forceinline__ void widen(Fragment& fragment, uint32_t stage, int of_stage, int part) const {
    if constexpr (kPacks) {
      const uint32_t at = stage + place_ ^ (of_stage * kParts + part) << 4;
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const uint4 codes = load_shared(at + f * kApart);
        const uint32_t word = decode::permuted(decode::permuted(codes.x, codes.y, choice_),
                                               decode::permuted(codes.z, codes.w, choice_), 0x5410);
        widen_word(fragment, f, word, part);
      }
    } else {
#pragma unroll
      for (int k16 = 0; k16 < kPartElements / 16; ++k16) {
        const uint32_t at = stage + place_ ^ (part * 2 + k16) << 4;
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          const uint32_t a = load_shared_word(at + f * kApart), b = load_shared_word(at + f * kApart + 8);
          if constexpr (C == Code::kInt8) {
            fragment[k16][f] = int8_in_order(decode::permuted(a, 0, choice_));
            fragment[k16][f + 2] = int8_in_order(decode::permuted(b, 0, choice_));
          } else {
            const uint32_t word = decode::permuted(a, b, choice_);
            const float scale = __uint_as_float(now_[f][0]);
            fragment[k16][f] = e4m3_in_order<0>(word, scale);
            fragment[k16][f + 2] = e4m3_in_order<1>(word, scale);
          }
        }
      }
    }
  }

 private:
  static constexpr int kApart = (Halves ? Features / 2 : 8) * kRowBytes;  // from one feature to the other in a stage

  // Scales of a feature along the contracted axis.
  __device__ __forceinline__ int blocks() const {
    return C == Code::kMxfp4 ? weight_.k / 32 : C == Code::kNvfp4 ? weight_.k / 16 : weight_.k >> weight_.k_shift;
  }

  // The word in which a byte lies, and its place there.
  static __device__ __forceinline__ uint32_t const* words(void const* start, int64_t byte, uint32_t& at) {
    at = byte % 4;
    return static_cast<uint32_t const*>(start) + byte / 4;
  }

  // What chooses four bytes from one of them on.
  static __device__ __forceinline__ uint32_t from_byte(uint32_t at) { return 0x3210 + 0x1111 * at; }

  // Reads the scales of a step. Words behind a feature's last one are not read.
  __device__ __forceinline__ void load(int step) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if constexpr (C == Code::kE4m3) {
        raw_[f][0] = weight_.k_shift == kWholeAxis ? __float_as_uint(1.0f) : __ldg(scales_[f] + step);
      } else if constexpr (C == Code::kInt4) {
        const int last = scales_at_[f] + 2 * blocks() - 1 >> 2, last_zero = zeros_at_[f] + blocks() - 1 >> 2;
        const bool wide = weight_.k_shift != 5;
        const int at = wide ? scales_at_[f] + 2 * step >> 2 : 2 * step, zero = wide ? zeros_at_[f] + step >> 2 : step;
#pragma unroll
        for (int i = 0; i < 3; ++i) raw_[f][i] = __ldg(scales_[f] + min(at + (wide ? 0 : i), last));
        if (weight_.more != nullptr) {
#pragma unroll
          for (int i = 0; i < 2; ++i) raw_[f][3 + i] = __ldg(zeros_[f] + min(zero + (wide ? 0 : i), last_zero));
        }
      } else if constexpr (kPacks) {
        const int last = scales_at_[f] + blocks() - 1 >> 2;
#pragma unroll
        for (int i = 0; i < kRawScales; ++i) raw_[f][i] = __ldg(scales_[f] + min(step * kScaleWords + i, last));
      }
    }
  }

  // Clears the scales of a step behind the first ones, `left` groups of 32 elements in number.
  __device__ __forceinline__ void clear_behind(int left) {
    constexpr int kBytes = C == Code::kMxfp4 ? 1 : 2;  // of a group's scales
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int i = 0; i < kScaleWords; ++i) {
        const int kept = left * kBytes - 4 * i;
        if (kept < 4) now_[f][i] &= kept <= 0 ? 0 : ~(~0u << 8 * kept);
      }
    }
  }

  // Whether a byte of the word needs more than `factors` does by addition: of E8M0 those above 128, of E4M3 those whose exponent
  // is 0 and the one that is no number.
  static __device__ __forceinline__ uint32_t is_special(uint32_t word) {
    if constexpr (C == Code::kMxfp4) {
      return (word & 0x7f7f7f7f) + 0x7f7f7f7f & word & 0x80808080;
    } else {
      return ~((word | 0x80808080) - 0x08080808) & 0x80808080 | (word + 0x01010101 | word) & 0x80808080;
    }
  }

  // Makes 128 of all scales of mxfp4 above it, which need two factors.
  __device__ __forceinline__ void split_scales() {
    static_assert(Widen::kMost == 128);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      whole_[f] = now_[f][0];
      now_[f][0] &= ~((is_special(now_[f][0]) >> 7) * 0x7f);
    }
  }

  // Widens a feature's codes of a part, eight in number, whose bytes are in the order of the fragment's pairs.
  __device__ __forceinline__ void widen_word(Fragment& fragment, int f, uint32_t word, int part) const {
    uint32_t(&first)[4] = fragment[0];
    uint32_t(&second)[4] = fragment[1];
    if constexpr (C == Code::kInt4) {
      const uint32_t scale = decode::permuted(now_[f][part / 2], 0, part % 2 == 0 ? 0x1010 : 0x3232);
      const uint32_t zero = decode::permuted(now_[f][2], 0x43, 0x4040 + 0x0101 * part), shifted = word >> 4;
      first[f] = int4_in_order<0>(word, shifted, scale, zero);
      first[f + 2] = int4_in_order<1>(word, shifted, scale, zero);
      second[f] = int4_in_order<2>(word, shifted, scale, zero);
      second[f + 2] = int4_in_order<3>(word, shifted, scale, zero);
    } else {
      uint32_t scales[2];  // of 16 elements each
      factors(scales, f, part);
      const uint32_t even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f;
      first[f] = decode::times(e2m1_in_order<0>(even, odd), scales[0]);
      first[f + 2] = decode::times(e2m1_in_order<1>(even, odd), scales[0]);
      second[f] = decode::times(e2m1_in_order<2>(even, odd), scales[1]);
      second[f + 2] = decode::times(e2m1_in_order<3>(even, odd), scales[1]);
      if constexpr (C == Code::kMxfp4) {
        if (special_) {
          const uint32_t more = Widen::scale(byte(whole_[f], part)).more;
          first[f] = decode::times(first[f], more), first[f + 2] = decode::times(first[f + 2], more);
          second[f] = decode::times(second[f], more), second[f + 2] = decode::times(second[f + 2], more);
        }
      }
    }
  }

  // The factors of a feature's E2M1 codes in a part, twice in a word.
  __device__ __forceinline__ void factors(uint32_t (&scales)[2], int f, int part) const {
    if constexpr (C == Code::kMxfp4) {
      scales[0] = scales[1] = Widen::factor(byte(now_[f][0], part));
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t e4m3 = byte(now_[f][part / 2], part % 2 * 2 + i);
        // The exponent's bias is 7, and the scale times 2^116.
        scales[i] = special_ ? Widen::scale(e4m3) : e4m3 * 0x00100010 + (127 - 7 + 116) * 0x00800080u;
      }
    }
  }

  static __device__ __forceinline__ uint32_t byte(uint32_t word, int i) { return decode::permuted(word, 0, 0x4440 + i); }

  Weight const& weight_;
  int first_, feature_;
  bool idle_ = false;
  uint32_t place_, choice_;
  float of_sums_[2];
  uint32_t const* scales_[2];
  uint32_t const* zeros_[2];
  uint32_t scales_at_[2], zeros_at_[2];
  uint32_t raw_[2][kRaw], now_[2][kWords];
  uint32_t whole_[2];  // the scales of mxfp4, if some are special
  bool special_ = false;
};

}  // namespace latent_moe::sm90
