#include "decode/listed_launch.cuh"

namespace latent_moe::decode {
namespace {

// An early launch starts when the blocks of the kernel before have begun.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, bool is_early, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &early, config.numAttrs = is_early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The limit of a kernel is the same in each call: another thread may launch it meanwhile, with wider rows.
cudaError_t multiply(Listed const& listed, cudaStream_t stream) {
  return launch_listed(listed, [&](auto* kernel, dim3 grid, int threads, int bytes, int most_bytes, Listed const& given) {
    auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
    return error == cudaSuccess ? launch(kernel, grid, threads, bytes, true, stream, given) : error;
  });
}

}  // namespace

cudaError_t multiply_listed(Listed const& first, Listed const& second, cudaStream_t stream) {
  Product const& product = second.product;
  const dim3 lists(ceil_div(product.experts + 1, kThreads / 32));
  auto error = launch(list_assignments, lists, kThreads, 0, false, stream, first);
  if (error == cudaSuccess) error = multiply(first, stream);
  if (error == cudaSuccess) error = multiply(second, stream);
  const dim3 grid(ceil_div(product.weight.n, kCombined), product.assignments / product.choices);
  return error == cudaSuccess ? launch(combine_choices, grid, kThreads, 0, true, stream, product) : error;
}

}  // namespace latent_moe::decode
