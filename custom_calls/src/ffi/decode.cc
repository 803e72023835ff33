// The handler of the experts of few tokens: it checks its arguments and launches both products, and an up-projection.
#include "ffi/decode.h"

#include <algorithm>
#include <cstdint>
#include <string>

namespace latent_moe {
namespace {

// The up-projection of one token. It has no columns if there is none.
decode::Projections projection(Check& check, Experts const& given, ffi::DataType type, int64_t tokens, int64_t width) {
  check.that(given.up_proj.dimensions().size() == 2, "up_proj of shape " + shape(given.up_proj) + " must have 2 axes");
  if (!check.ok()) return {};
  int64_t const columns = given.up_proj.dimensions()[1];
  check.that(columns == 0 || tokens == 1, "up_proj is for one token, not " + std::to_string(tokens));
  check.that(columns % 8 == 0 && columns < int64_t{1} << 21,
             "the " + std::to_string(columns) + " columns of up_proj are not a multiple of 8, or too many");
  check.that(decode::is_parts(given.parts), "parts=" + std::to_string(given.parts) + " must be 1, 2, 4 or 8");
  check.buffer("up_proj", given.up_proj, type, {width, columns});
  check.buffer("projected", given.projected, type, {tokens, columns});
  decode::Projections found = {};
  found.format = type == ffi::DataType::F16 ? Format::kF16 : Format::kBf16;
  found.x = given.out.untyped_data(), found.k = width;
  found.projection = given.up_proj.untyped_data(), found.width = columns, found.out = given.projected.untyped_data();
  found.parts = given.parts;
  return found;
}

}  // namespace

Products products(Check& check, Experts const& given) {
  check.that(given.tokens.dimensions().size() == 2, "tokens of shape " + shape(given.tokens) + " must have 2 axes");
  check.that(given.expert_ids.dimensions().size() == 2, "expert_ids of shape " + shape(given.expert_ids) + " must have 2 axes");
  check.that(given.hidden.dimensions().size() == 2, "hidden of shape " + shape(given.hidden) + " must have 2 axes");
  check.that(given.w_out.data.dimensions().size() >= 3,
             "w_out of shape " + shape(given.w_out.data) + " must have an axis of experts");
  check.that(given.partial.dimensions().size() == 3, "partial of shape " + shape(given.partial) + " must have 3 axes");
  if (check.ok()) check.that(given.partial.dimensions()[1] > 0, "partial of shape " + shape(given.partial) + " has no splits");
  if (!check.ok()) return {};
  int64_t const tokens = given.tokens.dimensions()[0], width = given.tokens.dimensions()[1];
  int64_t const choices = given.expert_ids.dimensions()[1], inner = given.hidden.dimensions()[1];
  int64_t const experts = given.w_out.data.dimensions()[0], splits = given.partial.dimensions()[1], assignments = tokens * choices;
  auto const activation = activation_of(check, given.activation);
  auto const type = given.tokens.element_type();
  check.that(type == ffi::DataType::BF16 || type == ffi::DataType::F16, "tokens must be bfloat16 or float16");
  check.that(activation != Activation::kNone, "the experts have an activation");
  check.that(assignments > 0 && assignments <= decode::kThreads,
             std::to_string(assignments) + " assignments must be 1 to " + std::to_string(decode::kThreads));
  check.that(width % 8 == 0, "the tokens' width " + std::to_string(width) + " is not a multiple of 8");
  check.that(experts > 0 && experts < int64_t{1} << 31, "there are no experts, or too many");
  int64_t const parts = is_gated(activation) ? 2 : 1, tiles = (width + decode::kLeastTile - 1) / decode::kLeastTile;
  int64_t const depths = (inner + decode::kDepth - 1) / decode::kDepth;
  check.that(splits <= std::max<int64_t>(depths, 1), std::to_string(splits) + " splits do not fit the inner width");
  check.buffer("tokens", given.tokens, type, {tokens, width});
  check.buffer("expert_ids", given.expert_ids, ffi::DataType::S32, {tokens, choices});
  check.buffer("weights", given.weights, ffi::DataType::F32, {tokens, choices});
  check.buffer("out", given.out, type, {tokens, width});
  check.buffer("hidden", given.hidden, type, {assignments, inner});
  check.buffer("partial", given.partial, ffi::DataType::F32, {assignments, splits, width});
  check.buffer("counters", given.counters, ffi::DataType::S32, {tokens * tiles});

  decode::Product first = {};
  first.format = type == ffi::DataType::F16 ? Format::kF16 : Format::kBf16;
  first.ids = given.expert_ids.typed_data<int32_t>();
  first.assignments = assignments, first.choices = choices, first.experts = experts;
  first.counters = static_cast<int32_t*>(given.counters.untyped_data());
  first.num_counters = tokens * tiles;
  first.hidden = given.hidden.untyped_data();
  first.activation = activation, first.beta = given.beta, first.linear_beta = given.linear_beta;
  first.rows = given.tokens.untyped_data(), first.depth = width;
  decode::Product second = first;
  first.weight = weight(check, given.w_in, type, experts, parts, width, inner);
  second.weight = weight(check, given.w_out, type, experts, 1, inner, width);
  second.rows = first.hidden;
  second.choice_weights = given.weights.typed_data<float>();
  second.partial = static_cast<float*>(given.partial.untyped_data());
  second.splits = splits, second.depth = (depths + splits - 1) / splits * decode::kDepth;
  second.out = given.out.untyped_data();
  return {first, second, projection(check, given, type, tokens, width)};
}

cudaError_t multiply(Products const& products, bool is_early, cudaStream_t stream) {
  auto error = decode::multiply(products.first, is_early, stream);
  if (error == cudaSuccess) error = decode::multiply(products.second, true, stream);
  if (error == cudaSuccess && products.up.width > 0) error = decode::multiply(products.up, true, stream);
  return error;
}

ffi::Error decode_experts(DecodeExpertsCall const& call) {
  Check check;
  auto const found = products(check, {call.tokens,
                                      call.expert_ids,
                                      call.weights,
                                      {"w_in", call.in_code, call.w_in, call.w_in_scales, call.w_in_more},
                                      {"w_out", call.out_code, call.w_out, call.w_out_scales, call.w_out_more},
                                      call.up_proj,
                                      *call.out,
                                      *call.hidden,
                                      *call.partial,
                                      *call.counters,
                                      *call.projected,
                                      call.activation,
                                      call.beta,
                                      call.linear_beta,
                                      call.parts});
  if (!check.ok()) return refuse(check.error());
  auto const error = multiply(found, false, call.stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " in decode");
}

}  // namespace latent_moe
