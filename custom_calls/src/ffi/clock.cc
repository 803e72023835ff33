// The handler of the device's clock.
#include "common/clock.h"

#include "common/check.h"
#include "interface.h"

namespace latent_moe {

ffi::Error device_clock(DeviceClockCall const& call) {
  Check check;
  check.buffer("nanoseconds", *call.nanoseconds, ffi::DataType::U32, {2});
  if (!check.ok()) return refuse(check.error());
  auto const error = read_clock(static_cast<uint32_t*>(call.nanoseconds->untyped_data()), call.stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

}  // namespace latent_moe
