// The handler of the projections of one token.
#include <cstdint>
#include <string>

#include "common/check.h"
#include "decode/projections.h"
#include "interface.h"

namespace latent_moe {

ffi::Error decode_projections(DecodeProjectionsCall const& call) {
  Check check;
  check.that(call.x.dimensions().size() == 2, "x of shape " + shape(call.x) + " must have 2 axes");
  check.that(call.kernel.dimensions().size() == 2, "kernel of shape " + shape(call.kernel) + " must have 2 axes");
  check.that(call.projection.dimensions().size() == 2, "projection of shape " + shape(call.projection) + " must have 2 axes");
  if (!check.ok()) return refuse(check.error());
  int64_t const k = call.x.dimensions()[1];
  int64_t const experts = call.kernel.dimensions()[1], width = call.projection.dimensions()[1];
  auto const type = call.x.element_type(), kernel = call.kernel.element_type();
  bool const is_float32 = kernel == ffi::DataType::F32;
  check.that(type == ffi::DataType::BF16 || type == ffi::DataType::F16, "x must be bfloat16 or float16");
  check.that(k > 0 && k < int64_t{1} << 30, "x of shape " + shape(call.x) + " has no columns, or too many");
  check.that(experts % (is_float32 ? 4 : 8) == 0,
             "the " + std::to_string(experts) + " columns of kernel are not whole 16 bytes");
  check.that(width % 8 == 0,
             "the " + std::to_string(width) + " columns of projection are not a multiple of 8");
  check.that(experts + width > 0 && experts + width < int64_t{1} << 21, "there are no columns, or too many");
  check.that(decode::is_parts(call.parts),
             "parts=" + std::to_string(call.parts) + " must be 1, 2, 4 or 8");
  check.buffer("x", call.x, type, {1, k});
  check.buffer("kernel", call.kernel, is_float32 ? kernel : type, {k, experts});
  check.buffer("projection", call.projection, type, {k, width});
  check.buffer("logits", *call.logits, ffi::DataType::F32, {1, experts});
  check.buffer("out", *call.out, type, {1, width});
  if (!check.ok()) return refuse(check.error());

  decode::Projections given = {};
  given.format = type == ffi::DataType::F16 ? Format::kF16 : Format::kBf16;
  given.x = call.x.untyped_data(), given.k = k;
  given.kernel = call.kernel.untyped_data(), given.is_kernel_float32 = is_float32, given.experts = experts;
  given.logits = static_cast<float*>(call.logits->untyped_data());
  given.projection = call.projection.untyped_data(), given.width = width, given.out = call.out->untyped_data();
  given.parts = call.parts;
  auto const error = decode::multiply(given, false, call.stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_latent_moe: ") + cudaGetErrorString(error) + " in projections");
}

}  // namespace latent_moe
