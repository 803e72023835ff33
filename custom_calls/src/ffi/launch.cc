#include "ffi/launch.h"

#include <algorithm>
#include <string>

#include "ffi/kernels.h"

namespace latent_moe {

Kernel const* named_kernel(Check& check, std::string_view name, std::initializer_list<Contraction> contractions,
                           bool with_activation) {
  Kernel const* kernel = find_kernel(name);
  if (kernel == nullptr) {
    check.that(false, not_compiled(name));
    return nullptr;
  }
  bool const fits = std::count(contractions.begin(), contractions.end(), kernel->contraction) > 0 &&
                    (kernel->activation != Activation::kNone) == with_activation &&
                    (kernel->format == Format::kBf16 || kernel->format == Format::kF16);
  check.that(fits, "kernel=" + std::string(name) + " is for another target");
  return fits ? kernel : nullptr;
}

void take_counters(Check& check, Args& args, ffi::AnyBuffer const& counters) {
  int64_t const size = args.gather.table == nullptr ? 2 : 5 + (int64_t{args.problem.num_rows} + kReadyRows - 1) / kReadyRows;
  check.buffer("counters", counters, ffi::DataType::S32, {size});
  args.counter = static_cast<uint64_t*>(counters.untyped_data());
  args.counter_bytes = size * sizeof(int32_t);
  args.gather.taken = reinterpret_cast<unsigned long long*>(args.counter + 1);
  args.gather.ready = reinterpret_cast<int32_t*>(args.counter + 2);
}

ffi::Error launch(Kernel const& kernel, Args const& checked, cudaStream_t stream) {
  std::string const what = "kernel " + std::string(kernel.name), experts = std::to_string(checked.problem.num_experts);
  if (checked.problem.num_experts > kernel.max_experts) {
    return refuse(experts + " experts are more than the " + std::to_string(kernel.max_experts) + " of " + what);
  }
  int device = 0, num_sms = 0;
  auto error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  Args args = checked;
  args.l2_slices = l2_slices_of(device);
  if (error == cudaSuccess) error = kernel.launch(args, num_sms, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " in " + what + " of " +
                              experts + " experts");
}

}  // namespace latent_moe
