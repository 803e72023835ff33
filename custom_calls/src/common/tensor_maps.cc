#include "common/tensor_maps.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "common/args.h"

namespace latent_moe {
namespace {

// The driver's function is looked up at run time, so that the library links no libcuda.
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

CUtensorMapDataType data_type(Format format) {
  switch (format) {
    case Format::kBf16:
    case Format::kBf16Codes:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Format::kF16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case Format::kE4m3:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
  return {};
}

template <size_t Rank>
Error encode(CUtensorMap* map, Format format, void const* data, cuuint64_t const (&sizes)[Rank],
             cuuint64_t const (&strides)[Rank - 1], cuuint32_t const (&box)[Rank]) {
  auto const encode_tiled = encoder();
  if (encode_tiled == nullptr) return "the driver has no cuTensorMapEncodeTiled: install a driver for CUDA 12 or newer";
  cuuint32_t const steps[5] = {1, 1, 1, 1, 1};
  auto const result = encode_tiled(map, data_type(format), Rank, const_cast<void*>(data), sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  std::string axes;
  for (auto size : sizes) axes += " " + std::to_string(size);
  return "cuTensorMapEncodeTiled refuses axes of" + axes + " with error " + std::to_string(result);
}

constexpr cuuint64_t kMost = cuuint64_t{1} << 31;
// The stride that subtracts Window::kAxis rows.
constexpr cuuint64_t back(cuuint64_t row) { return (cuuint64_t{1} << 34) - row; }

}  // namespace

Error dense_map(CUtensorMap* map, Format format, void const* data, int64_t depth, int64_t rows, int64_t columns,
                int box_rows) {
  cuuint64_t const row = columns * element_bytes(format);
  return encode(map, format, data, {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(depth)}, {row, row * rows},
                {cuuint32_t(block_columns(format)), cuuint32_t(box_rows), 1});
}

Error blocks_map(CUtensorMap* map, Format format, void const* data, int64_t depth, int64_t rows, int64_t columns,
                 int box_rows, int box_blocks) {
  cuuint64_t const row = columns * element_bytes(format), block = block_columns(format);
  return encode(map, format, data, {block, cuuint64_t(rows), columns / block, cuuint64_t(depth)},
                {row, kBoxBytes, row * rows}, {cuuint32_t(block), cuuint32_t(box_rows), cuuint32_t(box_blocks), 1});
}

Error window_map(CUtensorMap* map, Format format, void const* data, int64_t columns, int64_t pitch, int box_rows) {
  cuuint64_t const row = pitch * element_bytes(format);
  return encode(map, format, data, {cuuint64_t(columns), Window::kAxis, kMost, kMost}, {row, row, back(row)},
                {cuuint32_t(block_columns(format)), cuuint32_t(box_rows), 1, 1});
}

Error blocks_window_map(CUtensorMap* map, Format format, void const* data, int64_t columns, int64_t pitch, int box_rows,
                        int box_blocks) {
  cuuint64_t const row = pitch * element_bytes(format), block = block_columns(format);
  return encode(map, format, data, {block, Window::kAxis, columns / block, kMost, kMost}, {row, kBoxBytes, row, back(row)},
                {cuuint32_t(block), cuuint32_t(box_rows), cuuint32_t(box_blocks), 1, 1});
}

}  // namespace latent_moe
