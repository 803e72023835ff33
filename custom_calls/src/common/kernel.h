// What a compiled kernel is: the words of its name, its tile, and how it is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

namespace latent_moe {

struct Args;

enum class Contraction { kFwd, kDgrad, kWgrad };
enum class Format { kBf16, kF16 };
enum class Activation { kNone, kRelu2, kGelu, kGeluTanh, kSwiglu, kGeglu, kGegluTanh, kSituGlu };

// What a forward pass with an activation keeps for the gradient: the pre-activation; the hidden rows, which determine the
// slope of relu2; or the gate beside the hidden rows, which together determine the up half where hidden rows are a function
// of the gate times the up half. Gate and hidden rows are as many bytes as the pre-activation, and replace the hidden rows.
enum class Residual { kNone, kPre, kHidden, kGateHidden };

constexpr int element_bytes(Format format) {
  switch (format) {
    case Format::kBf16:
    case Format::kF16:
      return 2;
  }
  return 0;
}

constexpr bool is_gated(Activation a) { return a >= Activation::kSwiglu; }

// One block computes a tile of `rows` x `columns`. The blocks of a cluster share what they load: cluster_rows of them are
// stacked, cluster_columns are side by side.
struct Tile {
  int rows, columns, stages, cluster_rows, cluster_columns;
};

struct Kernel {
  std::string_view name;
  Contraction contraction;
  Format format;
  Activation activation;  // fwd: of the product; dgrad: its gradient is taken of the product
  Residual residual;
  Tile tile;
  int step_depth;   // elements of the contracted axis that are multiplied at a time
  int loaded_rows;  // of the boxes in which the rows of fwd and dgrad are loaded
  int stored_rows;  // of the boxes in which the product of wgrad is stored
  bool gathers;     // whether it can gather rows
  int max_experts;
  cudaError_t (*launch)(Args const&, int num_sms, cudaStream_t);
};

}  // namespace latent_moe
