// The handler of the experts of more tokens, whose rows are listed by expert.
#include "decode/listed.h"

#include "ffi/decode.h"

namespace latent_moe {

ffi::Error decode_listed_experts(DecodeListedExpertsCall const& call) {
  Check check;
  check.that(call.tokens.dimensions().size() == 2, "tokens of shape " + shape(call.tokens) + " must have 2 axes");
  check.that(call.expert_ids.dimensions().size() == 2, "expert_ids of shape " + shape(call.expert_ids) + " must have 2 axes");
  check.that(call.hidden->dimensions().size() == 2, "hidden of shape " + shape(*call.hidden) + " must have 2 axes");
  check.that(call.w_out.dimensions().size() == 4, "w_out of shape " + shape(call.w_out) + " must have 4 axes");
  if (!check.ok()) return refuse(check.error());
  int64_t const tokens = call.tokens.dimensions()[0], width = call.tokens.dimensions()[1];
  int64_t const choices = call.expert_ids.dimensions()[1], inner = call.hidden->dimensions()[1];
  int64_t const experts = call.w_out.dimensions()[0], assignments = tokens * choices;
  auto const activation = activation_of(check, call.activation);
  auto const type = ffi::DataType::BF16;
  check.that(activation != Activation::kNone, "the experts have an activation");
  check.that(call.in_code != "dense" && call.out_code != "dense", "weights must be codes");
  check.that(assignments > 0 && assignments < int64_t{1} << 20,
             std::to_string(assignments) + " assignments must be 1 to " + std::to_string((1 << 20) - 1));
  check.that(tokens < 1 << 16, std::to_string(tokens) + " tokens must be fewer than 65536");
  check.that(experts > 0 && experts < int64_t{1} << 24, "there are no experts, or too many");
  check.that(width % 16 == 0 && inner % 16 == 0, "the widths " + std::to_string(width) + " and " + std::to_string(inner) +
                                                     " are not multiples of 16");
  check.that(decode::is_pass(call.rows), "rows=" + std::to_string(call.rows) + " must be 8 or 16");
  check.that(call.sms > 0 && call.sms < 1024, "sms=" + std::to_string(call.sms) + " must be 1 to 1023");
  check.buffer("tokens", call.tokens, type, {tokens, width});
  check.buffer("expert_ids", call.expert_ids, ffi::DataType::S32, {tokens, choices});
  check.buffer("weights", call.weights, ffi::DataType::F32, {tokens, choices});
  check.buffer("out", *call.out, type, {tokens, width});
  check.buffer("hidden", *call.hidden, type, {assignments, inner});
  check.buffer("partial", *call.partial, ffi::DataType::F32, {assignments, decode::kPieces, width});
  check.buffer("lists", *call.lists, ffi::DataType::S32, {experts + 1 + assignments});

  decode::Listed first = {};
  decode::Product& product = first.product;
  int64_t const parts = is_gated(activation) ? 2 : 1;
  Stored const w_in{"w_in", call.in_code, call.w_in, call.w_in_scales, call.w_in_more};
  Stored const w_out{"w_out", call.out_code, call.w_out, call.w_out_scales, call.w_out_more};
  product.format = Format::kBf16;
  product.weight = weight(check, w_in, type, experts, parts, width, inner);
  product.rows = call.tokens.untyped_data();
  product.ids = call.expert_ids.typed_data<int32_t>();
  product.assignments = assignments, product.choices = choices, product.experts = experts;
  product.hidden = call.hidden->untyped_data();
  product.activation = activation, product.beta = call.beta, product.linear_beta = call.linear_beta;
  first.starts = static_cast<int32_t*>(call.lists->untyped_data()), first.list = first.starts + experts + 1;
  first.pass = call.rows, first.num_sms = call.sms;
  decode::Listed second = first;
  second.product.weight = weight(check, w_out, type, experts, 1, inner, width);
  second.product.rows = product.hidden;
  second.product.choice_weights = call.weights.typed_data<float>();
  second.product.partial = static_cast<float*>(call.partial->untyped_data());
  second.product.out = call.out->untyped_data();
  if (!check.ok()) return refuse(check.error());
  auto const error = decode::multiply_listed(first, second, call.stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " in decode");
}

}  // namespace latent_moe
