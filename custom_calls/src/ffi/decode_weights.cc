// What the handlers of few tokens and of more tokens read alike.
#include "ffi/decode.h"

namespace latent_moe {
namespace {

constexpr std::string_view kCodes[] = {"dense", "e4m3", "int8", "mxfp4", "nvfp4", "int4"};
constexpr std::string_view kActivations[] = {"none", "relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "situ_glu"};

template <size_t N>
int place(Check& check, char const* name, std::string_view value, std::string_view const (&known)[N]) {
  for (size_t i = 0; i < N; ++i) {
    if (known[i] == value) return i;
  }
  check.that(false, std::string(name) + "=" + std::string(value) + " is unknown to the kernels");
  return 0;
}

// log2 of the elements in a block, if there are that many blocks.
int shift_of(Check& check, std::string const& name, int64_t size, int64_t blocks, std::initializer_list<int> shifts) {
  if (blocks == 1) return kWholeAxis;
  for (int shift : shifts) {
    if (((size - 1) >> shift) + 1 == blocks) return shift;
  }
  check.that(false, name + " has " + std::to_string(blocks) + " blocks on an axis of " + std::to_string(size));
  return 0;
}

}  // namespace

Weight weight(Check& check, Stored const& stored, ffi::DataType dense, int64_t experts, int64_t parts, int64_t k, int64_t n) {
  auto const& [name, word, data, scales, more] = stored;
  Weight found = {};
  found.code = Code(place(check, name.c_str(), word, kCodes));
  found.data = data.untyped_data();
  found.scales = scales.untyped_data();
  found.more = more.element_count() > 0 ? more.untyped_data() : nullptr;
  found.parts = parts, found.n = n, found.k = k;
  int const packing = latent_moe::packing(found.code), multiple = found.code == Code::kDense ? 8 : 16 * packing;
  check.that(k > 0 && k % multiple == 0,
             "the " + std::to_string(k) + " inputs of " + name + " are not a positive multiple of " + std::to_string(multiple));
  if (found.code == Code::kDense) {
    check.buffer(name.c_str(), data, dense, {experts, k, parts * n});
    return found;
  }
  check.that(dense == ffi::DataType::BF16, "codes need tokens in bfloat16");
  auto const dims = scales.dimensions();
  check.that(dims.size() == 4, name + "_scales of shape " + shape(scales) + " must have 4 axes");
  if (!check.ok()) return found;
  bool const narrow = packing == 2;
  auto const type = !narrow                        ? ffi::DataType::F32
                    : found.code == Code::kInt4 ? ffi::DataType::BF16
                                                : ffi::DataType::U8;
  check.buffer(name.c_str(), data, found.code == Code::kInt8 ? ffi::DataType::S8 : ffi::DataType::U8,
               {experts, parts, n, k / packing});
  check.buffer((name + "_scales").c_str(), scales, type, {experts, parts, dims[2], dims[3]});
  // A scale of 4-bit codes is looked for by its group, even if there is only one on the axis.
  found.k_shift = !narrow                        ? shift_of(check, name + "_scales", k, dims[3], {7})
                  : found.code == Code::kMxfp4 ? 5
                  : found.code == Code::kNvfp4 ? 4
                  : k == 32 * dims[3]          ? 5
                                               : 7;
  found.n_shift = narrow ? 0 : shift_of(check, name + "_scales", n, dims[2], {0, 7});
  if (narrow) {
    check.that(dims[2] == n && dims[3] << found.k_shift == k,
               name + "_scales of shape " + shape(scales) + " do not fit its " + std::to_string(n) + " x " + std::to_string(k));
  }
  if (found.code == Code::kNvfp4) {
    check.buffer((name + "_more").c_str(), more, ffi::DataType::F32, {experts, parts, 1, 1});
  } else if (found.code == Code::kInt4 && found.more != nullptr) {
    check.buffer((name + "_more").c_str(), more, ffi::DataType::U8, {experts, parts, dims[2], dims[3]});
  }
  return found;
}

Activation activation_of(Check& check, std::string_view name) {
  return Activation(place(check, "activation", name, kActivations));
}

}  // namespace latent_moe
