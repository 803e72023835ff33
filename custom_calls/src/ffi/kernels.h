// Every kernel that was compiled, by name.
#pragma once

#include <string>
#include <string_view>

#include "common/kernel.h"

namespace latent_moe {

// The kernel of that name, or null.
Kernel const* find_kernel(std::string_view name);

// The error that there is no such kernel. It lists the kernels of the same contraction, format and activation.
std::string not_compiled(std::string_view name);

// A line for each kernel: its name, and the most experts that it takes.
std::string const& kernel_list();

}  // namespace latent_moe
