#include "tensor_maps.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

namespace latent_moe {
namespace {

constexpr int kBlock = 64;

// The driver's function is asked for at run time: the library links no libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static auto const function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result;
    auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &result);
    bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found ? pointer : nullptr);
  }();
  return function;
}

Error encode(CUtensorMap* map, Type type, void const* data, cuuint64_t const (&sizes)[3],
             cuuint64_t const (&strides)[2], int box_rows) {
  auto const encode_tiled = encoder();
  if (encode_tiled == nullptr) return "the driver has no cuTensorMapEncodeTiled: it needs to be of CUDA 12 or newer";
  cuuint32_t const box[3] = {kBlock, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
  auto const result = encode_tiled(
      map, type == Type::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  return "cuTensorMapEncodeTiled refuses sizes [" + std::to_string(sizes[2]) + ", " + std::to_string(sizes[1]) + ", " +
         std::to_string(sizes[0]) + "] with error " + std::to_string(result);
}

}  // namespace

Error dense_map(CUtensorMap* map, Type type, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int box_rows) {
  cuuint64_t const pitch = columns * 2;
  return encode(map, type, data, {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(depth)}, {pitch, pitch * rows},
                box_rows);
}

Error window_map(CUtensorMap* map, Type type, void const* data, int64_t rows, int64_t columns, int64_t pitch) {
  cuuint64_t const bytes = pitch * 2;
  auto const* start = static_cast<char const*>(data) - kBlock * bytes;
  return encode(map, type, start, {cuuint64_t(columns), kBlock, cuuint64_t(rows + kBlock)}, {bytes, bytes}, kBlock);
}

}  // namespace latent_moe
