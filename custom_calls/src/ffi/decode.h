// The arguments that the handlers of few tokens and of more tokens share.
#pragma once

#include <cstdint>
#include <string>

#include "common/check.h"
#include "decode/experts.h"
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

}  // namespace latent_moe
