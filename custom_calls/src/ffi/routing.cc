// The handlers of top-k and of the sort by expert.
#include <cstdint>
#include <string>

#include "common/check.h"
#include "interface.h"
#include "routing/expert_sort.h"
#include "routing/top_k.h"

namespace latent_moe {

namespace {

// The choice, and its weights if there are logits.
ffi::Error choose(cudaStream_t stream, ffi::AnyBuffer const& scores, ffi::AnyBuffer const& ids, routing::Weighing weighing,
                  ffi::AnyBuffer const* logits, ffi::AnyBuffer const* weights) {
  Check check;
  check.that(scores.dimensions().size() == 2, "scores of shape " + shape(scores) + " must have 2 axes");
  check.that(ids.dimensions().size() == 2, "expert_ids of shape " + shape(ids) + " must have 2 axes");
  if (!check.ok()) return refuse(check.error());
  int64_t const rows = scores.dimensions()[0], columns = scores.dimensions()[1], k = ids.dimensions()[1];
  check.buffer("scores", scores, ffi::DataType::F32, {rows, columns});
  check.buffer("expert_ids", ids, ffi::DataType::S32, {rows, k});
  check.that(columns <= routing::kMostScores,
             std::to_string(columns) + " scores a row are more than " + std::to_string(routing::kMostScores));
  check.that(k <= columns, "k=" + std::to_string(k) + " is more than the " + std::to_string(columns) + " scores of a row");
  check.that(rows < int64_t{1} << 31, std::to_string(rows) + " rows must be fewer than 2^31");
  if (logits != nullptr) {
    check.buffer("logits", *logits, ffi::DataType::F32, {rows, columns});
    check.buffer("weights", *weights, ffi::DataType::F32, {rows, k});
    check.that(k <= routing::kMostWeights,
               "k=" + std::to_string(k) + " weights a row are more than " + std::to_string(routing::kMostWeights));
    weighing.logits = logits->typed_data<float>();
    weighing.weights = static_cast<float*>(weights->untyped_data());
  }
  if (!check.ok()) return refuse(check.error());
  if (rows == 0 || k == 0) return ffi::Error::Success();
  auto const error =
      routing::top_k(scores.typed_data<float>(), static_cast<int32_t*>(ids.untyped_data()), rows, columns, k, weighing, stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

}  // namespace

ffi::Error top_k(TopKCall const& call) {
  return choose(call.stream, call.scores, *call.expert_ids, {}, nullptr, nullptr);
}

ffi::Error top_k_weights(TopKWeightsCall const& call) {
  routing::Weighing const weighing{nullptr, nullptr, call.sigmoid, call.eps, call.factor};
  return choose(call.stream, call.scores, *call.expert_ids, weighing, &call.logits, &*call.weights);
}

ffi::Error sort_by_expert(SortByExpertCall const& call) {
  ffi::AnyBuffer const &ids = call.expert_ids, &sizes = *call.group_sizes;
  Check check;
  check.that(ids.dimensions().size() == 1, "expert_ids of shape " + shape(ids) + " must have 1 axis");
  check.that(sizes.dimensions().size() == 1, "group_sizes of shape " + shape(sizes) + " must have 1 axis");
  if (!check.ok()) return refuse(check.error());
  int64_t const count = ids.dimensions()[0], experts = sizes.dimensions()[0];
  int64_t const chunks = (count + routing::kSortChunk - 1) / routing::kSortChunk;
  check.buffer("expert_ids", ids, ffi::DataType::S32, {count});
  check.buffer("group_sizes", sizes, ffi::DataType::S32, {experts});
  check.buffer("assignment_of_row", *call.assignment_of_row, ffi::DataType::S32, {count});
  check.buffer("row_of_assignment", *call.row_of_assignment, ffi::DataType::S32, {count});
  check.buffer("counts", *call.counts, ffi::DataType::S32, {chunks, experts + 1});
  check.that(experts <= routing::kMostExperts,
             std::to_string(experts) + " experts are more than " + std::to_string(routing::kMostExperts));
  check.that(count < int64_t{1} << 31, std::to_string(count) + " assignments must be fewer than 2^31");
  if (!check.ok()) return refuse(check.error());
  auto const data = [](ffi::AnyBuffer const& buffer) { return static_cast<int32_t*>(buffer.untyped_data()); };
  auto const error = routing::sort_by_expert(data(ids), count, experts, data(sizes), data(*call.assignment_of_row),
                                             data(*call.row_of_assignment), data(*call.counts), call.stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

}  // namespace latent_moe
