// Finds the kernel that a call names, and launches it.
#pragma once

#include <initializer_list>
#include <string_view>

#include "common/args.h"
#include "common/check.h"
#include "common/kernel.h"

namespace latent_moe {

// A kernel's rows must be fewer than this: it numbers all rows of its tiles in 32 bits.
constexpr int64_t kMostRows = (int64_t{1} << 31) - 256;

// The kernel of that name, for 16-bit operands. It must be for one of the contractions, and with or without an activation as
// asked. Null if a check fails.
Kernel const* named_kernel(Check& check, std::string_view name, std::initializer_list<Contraction> contractions,
                           bool with_activation);

// Checks the counters and sets them in args: two numbers count tiles. If rows are gathered, two more count chunks, and the
// others count copied rows, in all and in each block of kReadyRows. It needs complete args.problem and args.gather.
void take_counters(Check& check, Args& args, ffi::AnyBuffer const& counters);

// Launches a kernel, if no check has failed.
ffi::Error launch(Kernel const& kernel, Args const& checked, cudaStream_t stream);

}  // namespace latent_moe
