// The experts of few tokens, without a sort or a gather. The work is bound by reading the weights of the chosen experts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kernel.h"

namespace latent_moe::decode {

constexpr int kThreads = 256;  // threads of a block, and the most assignments
constexpr int kTile = 128;     // columns of a block; half gate and half up if the activation is gated
constexpr int kDepth = 128;    // the length of a part of the contracted axis is a multiple of this
constexpr int kWholeAxis = 31;
constexpr int kStart = 256;    // bytes; a block asks for 128 pieces of its weights before it needs them

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

// One of the two products of the experts with the rows of their assignments. Assignment a is the choice a % choices of token
// a / choices. An id outside [0, experts) is no expert.
struct Product {
  Weight weight;
  Format format;
  void const* rows;  // [assignments / row_divisor][k]
  int row_divisor;
  int32_t const* ids;  // [assignments]
  int assignments, choices, experts;
  int32_t* counters;  // [tokens][tiles of the second product], set to 0 by the first

  // The first product gives hidden [assignments][n] = activation(rows x weight). Rows of no expert are not written.
  void* hidden;
  Activation activation;
  float beta, linear_beta;
  int num_counters;

  // The second gives out [tokens][n], the weighted sum of a token's choices. `partial` [assignments][splits][n] is workspace.
  float const* choice_weights;  // [assignments]; null in the first product
  float* partial;
  int splits;
  void* out;
};

cudaError_t multiply(Product const& product, cudaStream_t stream);

}  // namespace latent_moe::decode
