#include "sm90/kernels.h"

#include "sm90/spec.h"

namespace latent_moe::sm90 {
namespace {

template <class Spec>
Kernel kernel(std::string_view name) {
  return {
      name,        Spec::kContraction, Spec::kFormat, Spec::kActivation,   Spec::kResidual, Spec::kTile, Spec::kStepDepth,
      kLoadedRows, kStoredRows,        Spec::kCounts && !Spec::kScaled, Spec::kEncodes,      max_experts<Spec>(), &launch<Spec>};
}

}  // namespace

std::vector<Kernel> const& kernels() {
#define LATENT_MOE_KERNEL(name, contraction, format, activation, residual, ...) \
  kernel<Spec<Contraction::contraction, Format::format, Activation::activation, Residual::residual, __VA_ARGS__>>(name),
  static std::vector<Kernel> const all = {
#include "sm90/kernels.inc"  // generated from kernels.txt
  };
#undef LATENT_MOE_KERNEL
  return all;
}

}  // namespace latent_moe::sm90
