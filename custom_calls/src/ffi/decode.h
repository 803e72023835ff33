// What the handlers of few tokens share.
#pragma once

#include <cstdint>
#include <string>

#include "common/check.h"
#include "decode/experts.h"
#include "decode/projections.h"
#include "interface.h"

namespace latent_moe {

// A weight as it is stored, and its name in messages.
struct Stored {
  std::string name;
  std::string_view code;
  ffi::AnyBuffer const &data, &scales, &more;
};

// A weight of `parts` matrices of k x n for each expert. A dense one is in the type `dense`.
Weight weight(Check& check, Stored const& stored, ffi::DataType dense, int64_t experts, int64_t parts, int64_t k, int64_t n);

Activation activation_of(Check& check, std::string_view name);

// The arguments of the experts without lists, and of an up-projection behind them.
struct Experts {
  ffi::AnyBuffer const &tokens, &expert_ids, &weights;
  Stored w_in, w_out;
  ffi::AnyBuffer const& up_proj;
  ffi::AnyBuffer const &out, &hidden, &partial, &counters, &projected;
  std::string_view activation;
  float beta, linear_beta;
  int parts;
};

// Their launches. The up-projection has no columns if there is none.
struct Products {
  decode::Product first, second;
  decode::Projections up;
};

Products products(Check& check, Experts const& experts);

// Launches them. With is_early, the first one waits for the end of the kernel before.
cudaError_t multiply(Products const& products, bool is_early, cudaStream_t stream);

// The router's logits and a projection of one token.
struct FirstProjections {
  ffi::AnyBuffer const &x, &kernel, &projection, &logits, &out;
  int parts;
};

decode::Projections projections(Check& check, FirstProjections const& given);

}  // namespace latent_moe
