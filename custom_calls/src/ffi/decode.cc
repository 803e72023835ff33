// The handler of the experts of few tokens: it checks its arguments and launches both products, and an up-projection.
#include <cstdint>
#include <string>

#include "decode/projections.h"
#include "ffi/decode.h"

namespace latent_moe {
namespace {

// The up-projection of one token. It has no columns if there is none.
decode::Projections projection(Check& check, DecodeExpertsCall const& call, ffi::DataType type, int64_t tokens, int64_t width) {
  check.that(call.up_proj.dimensions().size() == 2, "up_proj of shape " + shape(call.up_proj) + " must have 2 axes");
  if (!check.ok()) return {};
  int64_t const columns = call.up_proj.dimensions()[1];
  check.that(columns == 0 || tokens == 1, "up_proj is for one token, not " + std::to_string(tokens));
  check.that(columns % 8 == 0 && columns < int64_t{1} << 21,
             "the " + std::to_string(columns) + " columns of up_proj are not a multiple of 8, or too many");
  check.that(decode::is_parts(call.parts), "parts=" + std::to_string(call.parts) + " must be 1, 2, 4 or 8");
  check.buffer("up_proj", call.up_proj, type, {width, columns});
  check.buffer("projected", *call.projected, type, {tokens, columns});
  decode::Projections found = {};
  found.format = type == ffi::DataType::F16 ? Format::kF16 : Format::kBf16;
  found.x = call.out->untyped_data(), found.k = width;
  found.projection = call.up_proj.untyped_data(), found.width = columns, found.out = call.projected->untyped_data();
  found.parts = call.parts;
  return found;
}

}  // namespace

ffi::Error decode_experts(DecodeExpertsCall const& call) {
  Check check;
  check.that(call.tokens.dimensions().size() == 2, "tokens of shape " + shape(call.tokens) + " must have 2 axes");
  check.that(call.expert_ids.dimensions().size() == 2, "expert_ids of shape " + shape(call.expert_ids) + " must have 2 axes");
  check.that(call.hidden->dimensions().size() == 2, "hidden of shape " + shape(*call.hidden) + " must have 2 axes");
  check.that(call.w_out.dimensions().size() >= 3, "w_out of shape " + shape(call.w_out) + " must have an axis of experts");
  check.that(call.partial->dimensions().size() == 3, "partial of shape " + shape(*call.partial) + " must have 3 axes");
  if (!check.ok()) return refuse(check.error());
  int64_t const tokens = call.tokens.dimensions()[0], width = call.tokens.dimensions()[1];
  int64_t const choices = call.expert_ids.dimensions()[1], inner = call.hidden->dimensions()[1];
  int64_t const experts = call.w_out.dimensions()[0], splits = call.partial->dimensions()[1], assignments = tokens * choices;
  auto const activation = activation_of(check, call.activation);
  auto const type = call.tokens.element_type();
  check.that(type == ffi::DataType::BF16 || type == ffi::DataType::F16, "tokens must be bfloat16 or float16");
  check.that(activation != Activation::kNone, "the experts have an activation");
  check.that(assignments > 0 && assignments <= decode::kThreads,
             std::to_string(assignments) + " assignments must be 1 to " + std::to_string(decode::kThreads));
  check.that(width % 8 == 0, "the tokens' width " + std::to_string(width) + " is not a multiple of 8");
  check.that(experts > 0 && experts < int64_t{1} << 31, "there are no experts, or too many");
  int64_t const parts = is_gated(activation) ? 2 : 1, tiles = (width + decode::kLeastTile - 1) / decode::kLeastTile;
  int64_t const depths = (inner + decode::kDepth - 1) / decode::kDepth;
  check.that(splits > 0 && splits <= std::max<int64_t>(depths, 1), std::to_string(splits) + " splits do not fit the inner width");
  check.buffer("tokens", call.tokens, type, {tokens, width});
  check.buffer("expert_ids", call.expert_ids, ffi::DataType::S32, {tokens, choices});
  check.buffer("weights", call.weights, ffi::DataType::F32, {tokens, choices});
  check.buffer("out", *call.out, type, {tokens, width});
  check.buffer("hidden", *call.hidden, type, {assignments, inner});
  check.buffer("partial", *call.partial, ffi::DataType::F32, {assignments, splits, width});
  check.buffer("counters", *call.counters, ffi::DataType::S32, {tokens * tiles});

  decode::Product product = {};
  product.format = type == ffi::DataType::F16 ? Format::kF16 : Format::kBf16;
  product.ids = call.expert_ids.typed_data<int32_t>();
  product.assignments = assignments, product.choices = choices, product.experts = experts;
  product.counters = static_cast<int32_t*>(call.counters->untyped_data());
  product.num_counters = tokens * tiles;
  product.hidden = call.hidden->untyped_data();
  product.activation = activation, product.beta = call.beta, product.linear_beta = call.linear_beta;
  product.rows = call.tokens.untyped_data(), product.row_divisor = choices;
  Stored const w_in{"w_in", call.in_code, call.w_in, call.w_in_scales, call.w_in_more};
  Stored const w_out{"w_out", call.out_code, call.w_out, call.w_out_scales, call.w_out_more};
  product.weight = weight(check, w_in, type, experts, parts, width, inner);
  decode::Product second = product;
  second.weight = weight(check, w_out, type, experts, 1, inner, width);
  second.rows = product.hidden, second.row_divisor = 1;
  second.choice_weights = call.weights.typed_data<float>();
  second.partial = static_cast<float*>(call.partial->untyped_data());
  second.splits = splits, second.out = call.out->untyped_data();
  decode::Projections const up = projection(check, call, type, tokens, width);
  if (!check.ok()) return refuse(check.error());
  auto error = decode::multiply(product, call.stream);
  if (error == cudaSuccess) error = decode::multiply(second, call.stream);
  if (error == cudaSuccess && up.width > 0) error = decode::multiply(up, true, call.stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " in decode");
}

}  // namespace latent_moe
