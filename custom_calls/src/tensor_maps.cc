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

template <size_t Rank>
Error encode(CUtensorMap* map, Type type, void const* data, cuuint64_t const (&sizes)[Rank],
             cuuint64_t const (&strides)[Rank - 1], cuuint32_t const (&box)[Rank]) {
  auto const encode_tiled = encoder();
  if (encode_tiled == nullptr) return "the driver has no cuTensorMapEncodeTiled: it needs to be of CUDA 12 or newer";
  cuuint32_t const steps[5] = {1, 1, 1, 1, 1};
  auto const result = encode_tiled(
      map, type == Type::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, Rank,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  std::string axes;
  for (auto size : sizes) axes += " " + std::to_string(size);
  return "cuTensorMapEncodeTiled refuses axes of" + axes + " with error " + std::to_string(result);
}

constexpr cuuint64_t kMost = cuuint64_t{1} << 31;
constexpr cuuint64_t kBlockRow = kBlock * 2;  // bytes

// The stride that takes Window::kAxis rows off.
constexpr cuuint64_t back(cuuint64_t row) { return (cuuint64_t{1} << 34) - row; }

}  // namespace

Error dense_map(CUtensorMap* map, Type type, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int box_rows) {
  cuuint64_t const row = columns * 2;
  return encode(map, type, data, {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(depth)}, {row, row * rows},
                {kBlock, cuuint32_t(box_rows), 1});
}

Error blocks_map(CUtensorMap* map, Type type, void const* data, int64_t depth, int64_t rows, int64_t columns,
                 int blocks) {
  cuuint64_t const row = columns * 2;
  return encode(map, type, data, {kBlock, cuuint64_t(rows), cuuint64_t(columns / kBlock), cuuint64_t(depth)},
                {row, kBlockRow, row * rows}, {kBlock, kBlock, cuuint32_t(blocks), 1});
}

Error window_map(CUtensorMap* map, Type type, void const* data, int64_t columns, int64_t pitch, int box_rows) {
  cuuint64_t const row = pitch * 2;
  return encode(map, type, data, {cuuint64_t(columns), Window::kAxis, kMost, kMost}, {row, row, back(row)},
                {kBlock, cuuint32_t(box_rows), 1, 1});
}

Error blocks_window_map(CUtensorMap* map, Type type, void const* data, int64_t columns, int64_t pitch, int box_rows,
                        int blocks) {
  cuuint64_t const row = pitch * 2;
  return encode(map, type, data, {kBlock, Window::kAxis, cuuint64_t(columns / kBlock), kMost, kMost},
                {row, kBlockRow, row, back(row)}, {kBlock, cuuint32_t(box_rows), cuuint32_t(blocks), 1, 1});
}

}  // namespace latent_moe
