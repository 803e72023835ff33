// The XLA FFI handlers of the choice of experts and of the sort by expert.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <utility>

#include "check.h"
#include "expert_sort.h"
#include "handler.h"
#include "top_k.h"

namespace latent_moe {
namespace {

ffi::Error choose(cudaStream_t stream, ffi::AnyBuffer scores, ffi::Result<ffi::AnyBuffer> ids) {
  Check check;
  check.that(scores.dimensions().size() == 2, "scores of shape " + shape(scores) + " must have 2 axes");
  check.that(ids->dimensions().size() == 2, "the result of shape " + shape(*ids) + " must have 2 axes");
  if (!check.error().empty()) return refuse(check.error());
  int64_t const rows = scores.dimensions()[0], columns = scores.dimensions()[1], k = ids->dimensions()[1];
  check.buffer("scores", scores, ffi::DataType::F32, {rows, columns});
  check.buffer("the result", *ids, ffi::DataType::S32, {rows, k});
  check.that(columns <= kMostScores, std::to_string(columns) + " scores a row are more than " + std::to_string(kMostScores));
  check.that(k <= columns, "k=" + std::to_string(k) + " is more than the " + std::to_string(columns) + " scores of a row");
  check.that(rows < int64_t{1} << 31, "there are " + std::to_string(rows) + " rows, 2^31 or more");
  if (!check.error().empty()) return refuse(check.error());
  if (rows == 0 || k == 0) return ffi::Error::Success();
  auto const error = top_k(scores.typed_data<float>(), ids->typed_data<int32_t>(), rows, columns, k, stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

ffi::Error sort(cudaStream_t stream, ffi::AnyBuffer expert_ids, ffi::Result<ffi::AnyBuffer> sizes,
                ffi::Result<ffi::AnyBuffer> slot_of_row, ffi::Result<ffi::AnyBuffer> row_of_slot,
                ffi::Result<ffi::AnyBuffer> counts) {
  Check check;
  check.that(expert_ids.dimensions().size() == 1, "expert_ids of shape " + shape(expert_ids) + " must have 1 axis");
  check.that(sizes->dimensions().size() == 1, "group_sizes of shape " + shape(*sizes) + " must have 1 axis");
  if (!check.error().empty()) return refuse(check.error());
  int64_t const count = expert_ids.dimensions()[0], experts = sizes->dimensions()[0];
  check.buffer("expert_ids", expert_ids, ffi::DataType::S32, {count});
  check.buffer("group_sizes", *sizes, ffi::DataType::S32, {experts});
  check.buffer("slot_of_row", *slot_of_row, ffi::DataType::S32, {count});
  check.buffer("row_of_slot", *row_of_slot, ffi::DataType::S32, {count});
  check.buffer("the counts", *counts, ffi::DataType::S32, {(count + kSortChunk - 1) / kSortChunk, experts + 1});
  check.that(experts <= kMostBuckets, std::to_string(experts) + " experts are more than " + std::to_string(kMostBuckets));
  check.that(count < int64_t{1} << 31, "there are " + std::to_string(count) + " choices, 2^31 or more");
  if (!check.error().empty()) return refuse(check.error());
  auto const error =
      sort_by_expert(expert_ids.typed_data<int32_t>(), count, experts, sizes->typed_data<int32_t>(),
                     slot_of_row->typed_data<int32_t>(), row_of_slot->typed_data<int32_t>(),
                     counts->typed_data<int32_t>(), stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

auto bind_choose() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>();
}

auto bind_sort() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace
}  // namespace latent_moe

LATENT_MOE_HANDLER(latent_moe_top_k, latent_moe::choose, latent_moe::bind_choose());
LATENT_MOE_HANDLER(latent_moe_sort, latent_moe::sort, latent_moe::bind_sort());
