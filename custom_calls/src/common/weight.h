// Weights as they are stored, dense or in codes.
#pragma once

namespace latent_moe {

constexpr int kWholeAxis = 31;

enum class Code { kDense, kE4m3, kInt8, kMxfp4, kNvfp4, kInt4 };

constexpr int packing(Code code) { return code >= Code::kMxfp4 ? 2 : 1; }

// The weights of all experts: dense [experts][k][parts * n], or codes [experts][parts][n][k / packing].
//   scales [experts][parts][blocks of 2^n_shift along n][blocks of 2^k_shift along k], where kWholeAxis is one block: float32
//     of 8-bit codes; bytes E8M0 of kMxfp4, bytes E4M3 of kNvfp4, bfloat16 of kInt4, all with n_shift 0;
//   more: the float32 scale of each matrix of kNvfp4; the zero point (a byte) of each scale of kInt4, or null for 8.
struct Weight {
  Code code;
  void const* data;
  void const* scales;
  void const* more;
  int parts, n, k, n_shift, k_shift;
};

}  // namespace latent_moe
