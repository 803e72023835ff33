// The handler of the encoder of weights.
#include <cstdint>
#include <string>

#include "common/check.h"
#include "formats/encode_blocks.h"
#include "interface.h"

namespace latent_moe {

ffi::Error encode_blocks(EncodeBlocksCall const& call) {
  ffi::AnyBuffer const& weight = call.weight;
  Check check;
  check.that(weight.dimensions().size() == 3, "weight of shape " + shape(weight) + " must have 3 axes");
  if (!check.ok()) return refuse(check.error());
  int64_t const matrices = weight.dimensions()[0], k = weight.dimensions()[1], n = weight.dimensions()[2];
  check.that(k % formats::kBlock == 0 && n % formats::kBlock == 0,
             "weight of shape " + shape(weight) + " must have axes that " + std::to_string(formats::kBlock) + " divides");
  auto const type = weight.element_type();
  check.that(type == ffi::DataType::F32 || type == ffi::DataType::BF16 || type == ffi::DataType::F16,
             "weight must be float32, bfloat16 or float16");
  int64_t const k_blocks = k / formats::kBlock, n_blocks = n / formats::kBlock;
  check.buffer("weight", weight, type, {matrices, k, n});
  check.buffer("codes", *call.codes, ffi::DataType::U8, {matrices, k, n});
  check.buffer("transposed", *call.transposed, ffi::DataType::U8, {matrices, n, k});
  check.buffer("scales", *call.scales, ffi::DataType::F32, {matrices, k_blocks, n_blocks});
  check.that(matrices * k_blocks * n_blocks < int64_t{1} << 31,
             "weight of shape " + shape(weight) + " has 2^31 blocks or more");
  if (!check.ok()) return refuse(check.error());
  if (matrices * k_blocks * n_blocks == 0) return ffi::Error::Success();
  formats::EncodeBlocks arguments{};
  arguments.source = type == ffi::DataType::F32    ? formats::Source::kF32
                     : type == ffi::DataType::BF16 ? formats::Source::kBf16
                                                   : formats::Source::kF16;
  arguments.weight = weight.untyped_data();
  arguments.codes = static_cast<uint8_t*>(call.codes->untyped_data());
  arguments.transposed = static_cast<uint8_t*>(call.transposed->untyped_data());
  arguments.scales = static_cast<float*>(call.scales->untyped_data());
  arguments.matrices = matrices;
  arguments.k = k;
  arguments.n = n;
  arguments.power_of_two = call.power_of_two;
  auto const error = formats::encode_blocks(arguments, call.stream);
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

}  // namespace latent_moe
