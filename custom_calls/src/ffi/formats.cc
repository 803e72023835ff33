// The handlers that encode weights and rows, and that decode weights.
#include <cstdint>
#include <string>

#include "common/check.h"
#include "ffi/decode.h"
#include "formats/decode_weight.h"
#include "formats/encode_blocks.h"
#include "formats/encode_rows.h"
#include "interface.h"

namespace latent_moe {
namespace {

formats::Source source_of(ffi::DataType type) {
  return type == ffi::DataType::F32    ? formats::Source::kF32
         : type == ffi::DataType::BF16 ? formats::Source::kBf16
                                       : formats::Source::kF16;
}

ffi::Error done(cudaError_t error) {
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

// The codes and scales of rows of the shape of `like`. If a check fails, only `check` is set.
formats::RowCodes row_codes(Check& check, ffi::AnyBuffer const& like, ffi::AnyBuffer const& codes,
                            ffi::AnyBuffer const& scales, bool power_of_two) {
  check.that(like.dimensions().size() == 2, "rows of shape " + shape(like) + " must have 2 axes");
  if (!check.ok()) return {};
  int64_t const rows = like.dimensions()[0], k = like.dimensions()[1];
  int64_t const blocks = (k + formats::kBlock - 1) / formats::kBlock;
  check.that(k > 0 && k % 8 == 0, "rows of shape " + shape(like) + " must have a positive multiple of 8 features");
  check.that((rows + formats::kTileRows - 1) / formats::kTileRows * blocks < int64_t{1} << 31,
             "rows of shape " + shape(like) + " have 2^31 tiles or more");
  check.buffer("codes", codes, ffi::DataType::U8, {rows, k});
  check.buffer("scales", scales, ffi::DataType::F32, {blocks, rows});
  return {static_cast<uint8_t*>(codes.untyped_data()), static_cast<float*>(scales.untyped_data()), rows,
          static_cast<int>(k), power_of_two};
}

}  // namespace

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
  arguments.source = source_of(type);
  arguments.weight = weight.untyped_data();
  arguments.codes = static_cast<uint8_t*>(call.codes->untyped_data());
  arguments.transposed = static_cast<uint8_t*>(call.transposed->untyped_data());
  arguments.scales = static_cast<float*>(call.scales->untyped_data());
  arguments.matrices = matrices;
  arguments.k = k;
  arguments.n = n;
  arguments.power_of_two = call.power_of_two;
  return done(formats::encode_blocks(arguments, call.stream));
}

ffi::Error encode_rows(EncodeRowsCall const& call) {
  Check check;
  formats::RowCodes const to = row_codes(check, call.rows, *call.codes, *call.scales, call.power_of_two);
  if (!check.ok()) return refuse(check.error());
  auto const type = call.rows.element_type();
  check.that(type == ffi::DataType::F32 || type == ffi::DataType::BF16 || type == ffi::DataType::F16,
             "rows must be float32, bfloat16 or float16");
  check.buffer("rows", call.rows, type, {to.rows, to.k});
  if (!check.ok()) return refuse(check.error());
  if (to.rows == 0) return ffi::Error::Success();
  return done(formats::encode_rows({source_of(type), call.rows.untyped_data(), to}, call.stream));
}

ffi::Error relu2_gradient(Relu2GradientCall const& call) {
  Check check;
  formats::RowCodes const to = row_codes(check, call.dhidden, *call.codes, *call.scales, call.power_of_two);
  if (!check.ok()) return refuse(check.error());
  auto const type = call.dhidden.element_type();
  check.that(type == ffi::DataType::BF16 || type == ffi::DataType::F16, "dhidden must be bfloat16 or float16");
  check.buffer("dhidden", call.dhidden, type, {to.rows, to.k});
  check.buffer("hidden", call.hidden, type, {to.rows, to.k});
  check.buffer("row_weights", call.row_weights, ffi::DataType::F32, {to.rows});
  check.buffer("dpre", *call.dpre, type, {to.rows, to.k});
  check.buffer("row_weight_sums", *call.row_weight_sums, ffi::DataType::F32,
               {(to.k + formats::kBlock - 1) / formats::kBlock, to.rows});
  if (!check.ok()) return refuse(check.error());
  if (to.rows == 0) return ffi::Error::Success();
  formats::Relu2Gradient arguments{};
  arguments.source = source_of(type);
  arguments.dhidden = call.dhidden.untyped_data();
  arguments.hidden = call.hidden.untyped_data();
  arguments.row_weights = static_cast<float const*>(call.row_weights.untyped_data());
  arguments.dpre = call.dpre->untyped_data();
  arguments.row_weight_sums = static_cast<float*>(call.row_weight_sums->untyped_data());
  arguments.to = to;
  return done(formats::relu2_gradient(arguments, call.stream));
}

ffi::Error decode_weight(DecodeWeightCall const& call) {
  Check check;
  check.that(call.w.dimensions().size() == 4, "w of shape " + shape(call.w) + " must have 4 axes");
  check.that(call.out->dimensions().size() == 3, "out of shape " + shape(*call.out) + " must have 3 axes");
  if (!check.ok()) return refuse(check.error());
  auto const sizes = call.w.dimensions();
  int64_t const experts = sizes[0], parts = sizes[1], n = sizes[2], width = call.out->dimensions()[2];
  int64_t const k = sizes[3] * (call.w.element_type() == ffi::DataType::U8 && call.code != "e4m3" ? 2 : 1);
  auto const type = call.out->element_type();
  formats::DecodeWeight arguments{};
  arguments.weight = weight(check, {"w", call.code, call.w, call.w_scales, call.w_more}, ffi::DataType::BF16, experts, parts, k, n);
  if (!check.ok()) return refuse(check.error());
  int const multiple = 16 * packing(arguments.weight.code);
  check.that(arguments.weight.code != Code::kDense, "code=dense has no codes");
  check.that(type == ffi::DataType::BF16 || type == ffi::DataType::F16, "out must be bfloat16 or float16");
  check.buffer("out", *call.out, type, {experts, parts * n, width});
  check.that(call.first >= 0 && call.first % multiple == 0 && width % multiple == 0 && call.first + width <= k,
             "columns " + std::to_string(call.first) + " to " + std::to_string(call.first + width) + " of " + std::to_string(k) +
                 " must begin and end at multiples of " + std::to_string(multiple));
  check.that(experts * parts * n < int64_t{1} << 31, "w of shape " + shape(call.w) + " has 2^31 outputs or more");
  if (!check.ok()) return refuse(check.error());
  if (experts * parts * n * width == 0) return ffi::Error::Success();
  arguments.features = static_cast<int>(experts * parts * n);
  arguments.first = call.first;
  arguments.width = static_cast<int>(width);
  arguments.format = type == ffi::DataType::BF16 ? Format::kBf16 : Format::kF16;
  arguments.out = call.out->untyped_data();
  return done(formats::decode_weight(arguments, call.stream));
}

}  // namespace latent_moe
