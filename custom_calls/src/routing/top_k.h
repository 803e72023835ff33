// The k largest scores of each row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latent_moe::routing {

constexpr int kMostScores = 1024;  // scores of a row; each lane of a warp takes a 32nd of them

constexpr int kMostWeights = 32;   // weights of a row, one for each lane of a warp

constexpr int kFewRows = 256;  // up to so many rows, a block chooses for each of them if k <= kMostWeights

// The scores that decide the choice: the values, or their sigmoids if asked for, plus the bias [columns] if there is one.
struct Scores {
  float const* values;  // [rows][columns]
  float const* bias;
  bool sigmoid;
};

// How the weights [rows][k] of the choices follow from the logits [rows][columns]. Without logits there are no weights. With
// eps, they are sigmoids over (their sum + eps), else the softmax of the logits or of their log-sigmoids, all times factor.
struct Weighing {
  float const* logits;
  float* weights;
  bool sigmoid;
  float eps, factor;
};

// ids[row][0 ... k - 1] are the columns of the k largest scores, best first, the lower column first of equal scores.
// k <= columns <= kMostScores, and k <= kMostWeights with weights.
cudaError_t top_k(float const* scores, int32_t* ids, int rows, int columns, int k, Weighing const& weighing,
                  cudaStream_t stream);

// The same for few rows and k <= kMostWeights. A kernel that is launched early starts before the kernel that stores the scores has
// ended, and waits for that end.
cudaError_t top_k_of_few(Scores const& scores, int32_t* ids, int rows, int columns, int k, Weighing const& weighing, bool is_early,
                         cudaStream_t stream);

}  // namespace latent_moe::routing
