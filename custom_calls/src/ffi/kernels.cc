#include "ffi/kernels.h"

#include <vector>

#include "sm90/kernels.h"

namespace latent_moe {
namespace {

std::vector<Kernel> const& all() { return sm90::kernels(); }

// A name up to its residual, tile and cluster.
std::string_view kind(std::string_view name) {
  for (int part = 0; part < 2; ++part) name = name.substr(0, name.rfind('.'));
  return name.substr(0, name.find(':'));
}

}  // namespace

Kernel const* find_kernel(std::string_view name) {
  for (Kernel const& kernel : all()) {
    if (kernel.name == name) return &kernel;
  }
  return nullptr;
}

std::string not_compiled(std::string_view name) {
  std::string others;
  for (Kernel const& kernel : all()) {
    if (kind(kernel.name) == kind(name)) others += (others.empty() ? "" : ", ") + std::string(kernel.name);
  }
  return "kernel=" + std::string(name) + " was not compiled; compiled of its kind: " + (others.empty() ? "none" : others);
}

std::string const& kernel_list() {
  static std::string const list = [] {
    std::string lines;
    for (Kernel const& kernel : all()) {
      lines += std::string(kernel.name) + " " + std::to_string(kernel.max_experts) + "\n";
    }
    return lines;
  }();
  return list;
}

}  // namespace latent_moe
