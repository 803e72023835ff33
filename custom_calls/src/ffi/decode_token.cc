// The handler of one token's routed part: logits and down-projection, choice, both products of the experts, and an up-projection.
// Each kernel is launched while the one before runs.
#include <cstdint>
#include <string>

#include "ffi/decode.h"
#include "routing/top_k.h"

namespace latent_moe {

ffi::Error decode_token(DecodeTokenCall const& call) {
  Check check;
  auto const given = projections(check, {call.x, call.kernel, call.projection, *call.logits, *call.latent, call.parts});
  bool const is_projected = given.width > 0;
  auto found = products(check, {is_projected ? *call.latent : call.x,
                                *call.expert_ids,
                                *call.weights,
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
                                call.up_parts});
  int64_t const experts = given.experts, choices = found.first.choices;
  check.that(experts == found.first.experts, "kernel has " + std::to_string(experts) + " columns, not one for each of " +
                                                 std::to_string(found.first.experts) + " experts");
  check.that(experts <= routing::kMostScores,
             std::to_string(experts) + " experts are more than " + std::to_string(routing::kMostScores));
  check.that(choices <= experts && choices <= routing::kMostWeights,
             std::to_string(choices) + " choices are more than the experts, or than " + std::to_string(routing::kMostWeights));
  bool const is_biased = call.bias.element_count() > 0;
  check.buffer("bias", call.bias, ffi::DataType::F32, {is_biased ? experts : 0});
  if (!check.ok()) return refuse(check.error());
  found.first.distinct = found.second.distinct = true;

  routing::Scores const scores = {given.logits, is_biased ? call.bias.typed_data<float>() : nullptr, call.by_sigmoid};
  auto* const ids = static_cast<int32_t*>(call.expert_ids->untyped_data());
  auto* const weights = static_cast<float*>(call.weights->untyped_data());
  routing::Weighing const weighing = {given.logits, weights, call.sigmoid, call.eps, call.factor};
  auto error = decode::multiply(given, false, call.stream);
  if (error == cudaSuccess) error = routing::top_k_of_few(scores, ids, 1, experts, choices, weighing, true, call.stream);
  if (error == cudaSuccess) error = multiply(found, true, call.stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " in decode_token");
}

}  // namespace latent_moe
