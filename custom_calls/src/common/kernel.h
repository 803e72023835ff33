// A compiled kernel: the parts of its name, its tile, and its launch function.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

namespace latent_moe {

struct Args;

enum class Contraction { kFwd, kDgrad, kWgrad };
// Rows and weights of a kernel. kBf16Codes has bfloat16 rows, and weights in codes that widen to bfloat16.
enum class Format { kBf16, kF16, kE4m3, kBf16Codes };
enum class Activation { kNone, kRelu2, kGelu, kGeluTanh, kSwiglu, kGeglu, kGegluTanh, kSituGlu };

// What a forward pass with an activation keeps for the gradient: the pre-activation; the hidden rows, which determine the
// slope of relu2; or the gate and the hidden rows side by side, which determine the up half if hidden rows are a function
// of the gate times the up half. Gate and hidden rows have as many bytes as the pre-activation, and the hidden rows need
// not be stored again.
enum class Residual { kNone, kPre, kHidden, kGateHidden };

constexpr int element_bytes(Format format) {
  switch (format) {
    case Format::kBf16:
    case Format::kF16:
    case Format::kBf16Codes:
      return 2;
    case Format::kE4m3:
      return 1;
  }
  return 0;
}

// The format of a kernel's product. A product of codes is in bfloat16.
constexpr Format product_format(Format format) { return format == Format::kF16 ? format : Format::kBf16; }

constexpr int kScaleBlock = 128;  // elements of the contracted axis, and columns of a weight, that share a scale

constexpr bool is_gated(Activation a) { return a >= Activation::kSwiglu; }

// One block computes a tile of `rows` x `columns`. A cluster is cluster_rows x cluster_columns blocks, which share loads.
struct Tile {
  int rows, columns, stages, cluster_rows, cluster_columns;
};

struct Kernel {
  std::string_view name;
  Contraction contraction;
  Format format;
  Activation activation;  // fwd: applied to the product; dgrad: its gradient is applied
  Residual residual;
  Tile tile;
  int step_depth;   // elements of the contracted axis that are multiplied at a time
  int loaded_rows;  // rows of the boxes in which fwd and dgrad load rows
  int stored_rows;  // rows of the boxes in which wgrad stores its product
  bool gathers;     // whether it can gather rows
  bool encodes;     // whether it can store hidden rows, or the gradient of the pre-activation, as codes
  int max_experts;
  cudaError_t (*launch)(Args const&, int num_sms, cudaStream_t);
};

}  // namespace latent_moe
