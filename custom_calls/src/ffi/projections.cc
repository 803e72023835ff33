// The handler of the projections of one token.
#include <cstdint>
#include <string>

#include "ffi/decode.h"

namespace latent_moe {

decode::Projections projections(Check& check, FirstProjections const& buffers) {
  auto const& [x, kernel, projection, logits, out, parts] = buffers;
  check.that(x.dimensions().size() == 2, "x of shape " + shape(x) + " must have 2 axes");
  check.that(kernel.dimensions().size() == 2, "kernel of shape " + shape(kernel) + " must have 2 axes");
  check.that(projection.dimensions().size() == 2, "projection of shape " + shape(projection) + " must have 2 axes");
  if (!check.ok()) return {};
  int64_t const k = x.dimensions()[1];
  int64_t const experts = kernel.dimensions()[1], width = projection.dimensions()[1];
  auto const type = x.element_type();
  bool const is_float32 = kernel.element_type() == ffi::DataType::F32;
  check.that(type == ffi::DataType::BF16 || type == ffi::DataType::F16, "x must be bfloat16 or float16");
  check.that(k > 0 && k < int64_t{1} << 30, "x of shape " + shape(x) + " has no columns, or too many");
  check.that(experts % (is_float32 ? 4 : 8) == 0,
             "the " + std::to_string(experts) + " columns of kernel are not whole 16 bytes");
  check.that(width % 8 == 0,
             "the " + std::to_string(width) + " columns of projection are not a multiple of 8");
  check.that(experts + width > 0 && experts + width < int64_t{1} << 21, "there are no columns, or too many");
  check.that(decode::is_parts(parts), "parts=" + std::to_string(parts) + " must be 1, 2, 4 or 8");
  check.buffer("x", x, type, {1, k});
  check.buffer("kernel", kernel, is_float32 ? ffi::DataType::F32 : type, {k, experts});
  check.buffer("projection", projection, type, {k, width});
  check.buffer("logits", logits, ffi::DataType::F32, {1, experts});
  check.buffer("out", out, type, {1, width});

  decode::Projections given = {};
  given.format = type == ffi::DataType::F16 ? Format::kF16 : Format::kBf16;
  given.x = x.untyped_data(), given.k = k;
  given.kernel = kernel.untyped_data(), given.is_kernel_float32 = is_float32, given.experts = experts;
  given.logits = static_cast<float*>(logits.untyped_data());
  given.projection = projection.untyped_data(), given.width = width, given.out = out.untyped_data();
  given.parts = parts;
  return given;
}

ffi::Error decode_projections(DecodeProjectionsCall const& call) {
  Check check;
  auto const given = projections(check, {call.x, call.kernel, call.projection, *call.logits, *call.out, call.parts});
  if (!check.ok()) return refuse(check.error());
  auto const error = decode::multiply(given, false, call.stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " in projections");
}

}  // namespace latent_moe
