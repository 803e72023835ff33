// The library's functions other than its targets.
#include <algorithm>
#include <iterator>
#include <string>

#include "common/l2_slices.h"
#include "ffi/handler.h"
#include "ffi/kernels.h"

namespace latent_moe {
namespace {

namespace ffi = xla::ffi;

// XLA calls this before it records or runs a program. At that time, the program may still wait for the device.
ffi::Error initialize(cudaStream_t stream, int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  auto const error = measure_l2_slices(device, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " while timing the L2 cache");
}

auto bind_initialize() {
  return ffi::Ffi::BindInitialize()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

}  // namespace
}  // namespace latent_moe

LATENT_MOE_HANDLER(latent_moe_initialize, latent_moe::initialize, latent_moe::bind_initialize())

// A line for each kernel: its name, and how many experts it takes at most.
LATENT_MOE_EXPORT char const* latent_moe_kernels() { return latent_moe::kernel_list().c_str(); }

// For tests: L2Slices::kMaxSms bits, one for each SM.
LATENT_MOE_EXPORT void latent_moe_l2_slices(int32_t device, uint32_t* bits) {
  auto const& slices = latent_moe::l2_slices_of(device);
  std::copy(std::begin(slices.bits), std::end(slices.bits), bits);
}
