// The kernels that were compiled for Hopper.
#pragma once

#include <vector>

#include "common/kernel.h"

namespace latent_moe::sm90 {

std::vector<Kernel> const& kernels();

}  // namespace latent_moe::sm90
