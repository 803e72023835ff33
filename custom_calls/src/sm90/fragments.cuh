// A thread's part of a weight in codes, widened in registers as the first operand of products.
//
// For 16 elements k of the contracted axis, a thread of wgmma holds those at 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of two rows of
// the operand, q = thread % 4. The rows are features of the weight, any two will do: neighbours by 8, or a gate and its up
// half. TMA has copied 128 bytes of codes of each feature to a swizzled row of a stage. Scales come from memory, a step
// ahead. A step is 128 elements.
#pragma once

#include "sm90/instructions.cuh"
#include "sm90/widened.cuh"

namespace latent_moe::sm90 {

constexpr int kStepElements = 128;

// Bytes of codes of a feature in a stage are those of so many steps.
template <Code C>
constexpr int kStageSteps = packing(C);

// A tile has so many features. If Halves is true, half of them are gates, half up, and a thread's features are a gate and its
// up half. A part of a step is widened at a time.
template <Code C, bool Halves, int Features, int PartElements>
class Fragments {
  using Widen = decode::Widen<C>;
  static constexpr bool kPacks = packing(C) == 2;
  // Words of a feature's scales in a step, or its one factor; a word of int4's zero points follows.
  static constexpr int kScaleWords = C == Code::kMxfp4 ? 1 : C == Code::kNvfp4 || C == Code::kInt4 ? 2 : 0;
  static constexpr int kWords = C == Code::kInt4 ? 3 : kScaleWords > 0 ? kScaleWords : 1;
  // Words that are read ahead: scales may begin at any byte of the first one, and end in one more.
  static constexpr int kRawScales = kPacks ? kScaleWords + 1 : 1, kRaw = C == Code::kInt4 ? kRawScales + 2 : kRawScales;
  static constexpr int kUnits = PartElements / 32;  // of a part

 public:
  static constexpr int kParts = kStepElements / PartElements;

  // The operand of the products with 16 elements each of a part.
  using Fragment = uint32_t[PartElements / 16][4];

  static constexpr bool kScalesSums = C != Code::kMxfp4 && C != Code::kInt4;

  // The codes of a part in which the thread's elements lie: a word of 32 elements in 4 bits, or 4 words of 32 in 8 bits.
  using Codes = std::conditional_t<kPacks, uint32_t, uint4>[kUnits][2];

  __device__ Fragments(Weight const& weight, int warpgroup, int thread)
      : weight_(weight), first_(warpgroup * (Halves ? 32 : 64)) {
    const int warp = thread / 32, in_eight = thread % 32 / 4, quarter = thread % 4;
    feature_ = first_ + warp * (Halves ? 8 : 16) + in_eight;
    place_ = feature_ * kRowBytes + (in_eight << 4) + (kPacks ? quarter * 4 : quarter / 2 * 4);
    if constexpr (C == Code::kInt8) {
      choice_ = quarter % 2 ? 0x3322 : 0x1100;
    } else {
      choice_ = quarter % 2 ? 0x7632 : 0x5410;
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
        if constexpr (C == Code::kInt4) {
          zeros_[f] = words(weight_.more == nullptr ? weight_.scales : weight_.more, first, zeros_at_[f]);
        }
      } else if constexpr (C == Code::kE4m3) {
        scales_[f] = reinterpret_cast<uint32_t const*>(decode::scales_of<C>(weight_, matrix, own));
      }
    }
    load(0);
  }

  // Whether all features of the tile lie beyond the last one, in all threads of the warpgroup.
  __device__ __forceinline__ bool is_idle() const { return idle_; }

  __device__ __forceinline__ float of_sum(int f) const { return of_sums_[f]; }

  // Takes the scales of a step, and begins to read those of the next one. Behind the contracted axis narrow scales are 0, because
  // zeros of the rows need finite partners. A float32 scale is of elements before the end too. Whole warps call it.
  __device__ __forceinline__ void take(int step) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if constexpr (C == Code::kE4m3) {
        now_[f][0] = weight_.k_shift == kWholeAxis ? __float_as_uint(1.0f) : raw_[f][0];
      } else if constexpr (C == Code::kInt4) {
        const uint32_t scale = is_wide() ? 0x1010 + 0x1111 * ((scales_at_[f] + 2 * step) % 4) : from_byte(scales_at_[f]);
        const uint32_t zero = is_wide() ? 0x1111 * ((zeros_at_[f] + step) % 4) : from_byte(zeros_at_[f]);
        now_[f][0] = decode::permuted(raw_[f][0], raw_[f][1], scale);
        now_[f][1] = decode::permuted(raw_[f][1], raw_[f][2], scale);
        now_[f][2] = weight_.more == nullptr ? 0x08080808 : decode::permuted(raw_[f][3], raw_[f][4], zero);
      } else if constexpr (kPacks) {
#pragma unroll
        for (int i = 0; i < kScaleWords; ++i) {
          now_[f][i] = decode::permuted(raw_[f][i], raw_[f][i + 1], from_byte(scales_at_[f]));
        }
      }
    }
    if constexpr (kPacks) {
      const int left = weight_.k - step * kStepElements >> 5;
      if (left < kStepElements / 32) clear_behind(left);
    }
    if constexpr (C == Code::kMxfp4 || C == Code::kNvfp4) {
      uint32_t special = 0;
      if constexpr (C == Code::kMxfp4) {
        special = is_special(now_[0][0] | now_[1][0]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) special |= is_special(now_[i % 2][i / 2]);
      }
      special_ = __any_sync(~0u, special != 0);
      if constexpr (C == Code::kMxfp4) {
        if (special_) split_scales();
      }
    }
    // The last step is read once more. A branch would end at a copy of what is read, which waits for it.
    load(step * kStepElements + kStepElements < weight_.k ? step + 1 : step);
  }

  // Reads the codes of a part of a step, out of a stage at an address in shared memory. The step is the `of_stage`-th one there.
  __device__ __forceinline__ void read(Codes& codes, uint32_t stage, int of_stage, int part) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int at_unit = part * kUnits + unit;
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        if constexpr (kPacks) {
          codes[unit][f] = load_shared_word((stage + place_ ^ (of_stage * 4 + at_unit) << 4) + f * kApart);
        } else {
          const uint32_t first = (stage + place_ ^ (2 * at_unit) << 4) + f * kApart, second = first ^ 16;
          codes[unit][f] = {load_shared_word(first), load_shared_word(first + 8), load_shared_word(second),
                            load_shared_word(second + 8)};
        }
      }
    }
  }

  // Widens what was read of a part of the step whose scales are taken. Rare scales are behind a single branch: the compiler
  // mixes the instructions of all units up to there.
  __device__ __forceinline__ void widen(Fragment& fragment, Codes const& codes, int part) const {
    widen_with<false>(fragment, codes, part);
    if constexpr (C == Code::kNvfp4) {
      if (special_) widen_with<true>(fragment, codes, part);
    } else if constexpr (C == Code::kMxfp4) {
      if (special_) multiply_more(fragment, part);
    }
  }

 private:
  static constexpr int kApart = (Halves ? Features / 2 : 8) * kRowBytes;  // from one feature to the other in a stage

  template <bool AnyScale>
  __device__ __forceinline__ void widen_with(Fragment& fragment, Codes const& codes, int part) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      uint32_t(&first)[4] = fragment[2 * unit];
      uint32_t(&second)[4] = fragment[2 * unit + 1];
      const int at_unit = part * kUnits + unit;
      uint32_t scales[2][2];  // of each feature and 16 elements, twice in a word
      if constexpr (kPacks) factors<AnyScale>(scales, at_unit);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        auto const x = codes[unit][f];
        if constexpr (C == Code::kInt8) {
          first[f] = int8_in_order(decode::permuted(x.x, 0, choice_));
          first[f + 2] = int8_in_order(decode::permuted(x.y, 0, choice_));
          second[f] = int8_in_order(decode::permuted(x.z, 0, choice_));
          second[f + 2] = int8_in_order(decode::permuted(x.w, 0, choice_));
        } else if constexpr (C == Code::kE4m3) {
          const uint32_t a = decode::permuted(x.x, x.y, choice_), b = decode::permuted(x.z, x.w, choice_);
          const float scale = __uint_as_float(now_[f][0]);
          first[f] = e4m3_in_order<0>(a, scale), first[f + 2] = e4m3_in_order<1>(a, scale);
          second[f] = e4m3_in_order<0>(b, scale), second[f + 2] = e4m3_in_order<1>(b, scale);
        } else {
          const auto pair = [&](auto i) {
            const uint32_t scale = scales[f][i() / 2];
            if constexpr (C == Code::kInt4) {
              const uint32_t zero = decode::permuted(now_[f][2], 0x43, 0x4040 + 0x0101 * at_unit);
              return Widen::template pair<i()>(x, {scale, zero});
            } else {
              return decode::times(decode::e2m1_pair<i()>(x), scale);
            }
          };
          first[f] = pair(std::integral_constant<int, 0>{}), first[f + 2] = pair(std::integral_constant<int, 1>{});
          second[f] = pair(std::integral_constant<int, 2>{}), second[f + 2] = pair(std::integral_constant<int, 3>{});
        }
      }
    }
  }

  // Scales of a feature along the contracted axis.
  __device__ __forceinline__ int blocks() const {
    return C == Code::kMxfp4 ? weight_.k >> 5 : C == Code::kNvfp4 ? weight_.k >> 4 : weight_.k >> weight_.k_shift;
  }

  // The word in which a byte lies, and its place there.
  static __device__ __forceinline__ uint32_t const* words(void const* start, int64_t byte, uint32_t& at) {
    at = byte % 4;
    return static_cast<uint32_t const*>(start) + byte / 4;
  }

  // What chooses four bytes from one of them on.
  static __device__ __forceinline__ uint32_t from_byte(uint32_t at) { return 0x3210 + 0x1111 * at; }

  // Whether int4 has one scale for the elements of a step, rather than four.
  __device__ __forceinline__ bool is_wide() const { return weight_.k_shift != 5; }

  // Reads the words in which the scales of a step lie. Words behind a feature's last one are not read.
  __device__ __forceinline__ void load(int step) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if constexpr (C == Code::kE4m3) {
        raw_[f][0] = __ldg(scales_[f] + (weight_.k_shift == kWholeAxis ? 0 : step));
      } else if constexpr (kPacks) {
        const int last = scales_at_[f] + blocks() * decode::kScaleBytes<C> - 1 >> 2;
        const bool wide = C == Code::kInt4 && is_wide();
        const int at = wide ? scales_at_[f] + 2 * step >> 2 : kScaleWords * step;
#pragma unroll
        for (int i = 0; i < kRawScales; ++i) raw_[f][i] = __ldg(scales_[f] + min(at + (wide ? 0 : i), last));
        if constexpr (C == Code::kInt4) {
          const int last_zero = zeros_at_[f] + blocks() - 1 >> 2, at_zero = wide ? zeros_at_[f] + step >> 2 : step;
#pragma unroll
          for (int i = 0; i < 2; ++i) raw_[f][kRawScales + i] = __ldg(zeros_[f] + min(at_zero + (wide ? 0 : i), last_zero));
        }
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

  // The factors of the codes of 32 elements, of nvfp4 for any scale or only for those that are not special.
  template <bool AnyScale>
  __device__ __forceinline__ void factors(uint32_t (&scales)[2][2], int at_unit) const {
    if constexpr (C == Code::kNvfp4) {
      const auto e4m3 = [&](int f, int i) { return byte(now_[f][at_unit / 2], at_unit % 2 * 2 + i); };
      if constexpr (AnyScale) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i / 2][i % 2] = Widen::scale(e4m3(i / 2, i % 2));
      } else {
        // The exponent's bias is 7, and the scale times 2^116.
        constexpr uint32_t kExponent = (127 - 7 + 116) * 0x00800080u;
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i / 2][i % 2] = e4m3(i / 2, i % 2) * 0x00100010 + kExponent;
      }
    } else {
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        if constexpr (C == Code::kMxfp4) {
          scales[f][0] = Widen::factor(byte(now_[f][0], at_unit));
        } else {
          scales[f][0] = decode::permuted(now_[f][at_unit / 2], 0, at_unit % 2 == 0 ? 0x1010 : 0x3232);
        }
        scales[f][1] = scales[f][0];
      }
    }
  }

  // Multiplies by what the first factors of mxfp4 lack.
  __device__ __forceinline__ void multiply_more(Fragment& fragment, int part) const {
#pragma unroll
    for (int i = 0; i < 2 * kUnits; ++i) {
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const uint32_t more = Widen::scale(byte(whole_[f], part * kUnits + i / 2)).more;
        fragment[i][f] = decode::times(fragment[i][f], more), fragment[i][f + 2] = decode::times(fragment[i][f + 2], more);
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
