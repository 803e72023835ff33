// The experts of few tokens, without a sort or a gather. The work is bound by reading the weights of the chosen experts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kernel.h"
#include "common/weight.h"

namespace latent_moe::decode {

constexpr int kThreads = 256;   // the most threads of a block, and the most assignments
constexpr int kLeastTile = 64;  // the fewest columns of a block; half gate and half up if the activation is gated
constexpr int kDepth = 128;     // the length of a part of the contracted axis is a multiple of this
constexpr int kStart = 256;     // bytes of each row of dense weights that a block asks for before it needs them

// One of the two products of the experts with the rows of their assignments. Assignment a is the choice a % choices of token
// a / choices. An id outside [0, experts) is no expert.
struct Product {
  Weight weight;
  Format format;
  void const* rows;    // [tokens][k] of the first product, [assignments][k] of the second
  int32_t const* ids;  // [assignments]
  int assignments, choices, experts;
  bool distinct;  // every assignment has an expert, and no two of them the same one
  int depth;      // how many elements of the contracted axis a block multiplies
  int32_t* counters;  // [tokens][tiles of the second product] at least, set to 0 by the first

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

// A kernel that is launched early starts before the previous kernel has ended. It waits for that end before it reads its results.
// The second product is always early. The first one may be early if the previous kernel makes the choice.
cudaError_t multiply(Product const& product, bool is_early, cudaStream_t stream);

}  // namespace latent_moe::decode
