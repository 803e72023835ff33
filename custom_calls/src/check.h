// What handlers say of calls that break a rule.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "instance.h"
#include "tensor_maps.h"
#include "xla/ffi/api/ffi.h"

namespace latent_moe {

namespace ffi = xla::ffi;

inline ffi::Error refuse(std::string const& what) { return ffi::Error::InvalidArgument("jax_latent_moe: " + what); }

inline std::string shape(ffi::AnyBuffer const& buffer) {
  std::string text = "[";
  for (int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Collects the first rule that a call breaks.
class Check {
 public:
  void that(bool holds, std::string const& otherwise) {
    if (!holds && error_.empty()) error_ = otherwise;
  }

  void buffer(char const* name, ffi::AnyBuffer const& buffer, ffi::DataType type, std::initializer_list<int64_t> sizes) {
    auto const dims = buffer.dimensions();
    std::string expected = "[";
    for (int64_t size : sizes) expected += (expected.size() > 1 ? ", " : "") + std::to_string(size);
    bool const fits = dims.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), dims.begin());
    that(fits, std::string(name) + " of shape " + shape(buffer) + " must be of shape " + expected + "]");
    that(buffer.element_type() == type, std::string(name) + " is of element type " +
                                            std::to_string(static_cast<int>(buffer.element_type())) + ", not " +
                                            std::to_string(static_cast<int>(type)));
    that(reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 == 0, std::string(name) + " is not aligned to 16 bytes");
  }

  void features(char const* name, int64_t size) {
    that(size > 0 && size % 8 == 0, std::string(name) + "=" + std::to_string(size) + " is not a positive multiple of 8");
  }

  void operator()(Error const& error) { that(error.empty(), error); }

  std::string const& error() const { return error_; }

 private:
  std::string error_;
};

inline std::optional<Type> type_of(ffi::AnyBuffer const& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::BF16:
      return Type::kBf16;
    case ffi::DataType::F16:
      return Type::kF16;
    default:
      return std::nullopt;
  }
}

}  // namespace latent_moe
