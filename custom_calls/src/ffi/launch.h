// From a call that names a kernel to its launch.
#pragma once

#include <initializer_list>
#include <string_view>

#include "common/args.h"
#include "common/check.h"
#include "common/kernel.h"

namespace latent_moe {

// Rows of a kernel must be fewer than this: it numbers them, and those of a last partial tile, in 32 bits.
constexpr int64_t kMostRows = (int64_t{1} << 31) - 256;

// The kernel of that name, which must be for one of the contractions, and with an activation or without. Null where a check
// fails.
Kernel const* named_kernel(Check& check, std::string_view name, std::initializer_list<Contraction> contractions,
                           bool with_activation);

// Checks the counters and describes them: two numbers count tiles. Where rows are gathered, two more count chunks, and the
// others the rows that are copied, of all and of each kReadyRows. To be called when args.problem and args.gather are
// complete.
void take_counters(Check& check, Args& args, ffi::AnyBuffer const& counters);

// Launches a kernel for what was checked.
ffi::Error launch(Kernel const& kernel, Args const& checked, cudaStream_t stream);

}  // namespace latent_moe
