// Checks of a handler's arguments. A failed check becomes the error that the handler returns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "common/kernel.h"
#include "xla/ffi/api/ffi.h"

namespace latent_moe {

namespace ffi = xla::ffi;

inline ffi::Error refuse(std::string const& what) { return ffi::Error::InvalidArgument("jax_latent_moe: " + what); }

inline std::string shape(ffi::AnyBuffer const& buffer) {
  std::string text = "[";
  for (int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Keeps the first rule that a call breaks.
class Check {
 public:
  void that(bool holds, std::string const& otherwise) {
    if (!holds && error_.empty()) error_ = otherwise;
  }

  // Texts are made only for rules that are broken: the host makes about a hundred of these checks for a call of a layer.
  void buffer(char const* name, ffi::AnyBuffer const& buffer, ffi::DataType type, std::initializer_list<int64_t> sizes) {
    auto const dims = buffer.dimensions();
    if (dims.size() != sizes.size() || !std::equal(sizes.begin(), sizes.end(), dims.begin())) {
      std::string expected = "[";
      for (int64_t size : sizes) expected += (expected.size() > 1 ? ", " : "") + std::to_string(size);
      that(false, std::string(name) + " of shape " + shape(buffer) + " must be of shape " + expected + "]");
    }
    if (buffer.element_type() != type) {
      std::ostringstream types;
      types << name << " is of element type " << buffer.element_type() << ", not " << type;
      that(false, types.str());
    }
    if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
      that(false, std::string(name) + " is not aligned to 16 bytes");
    }
  }

  // Rows are read 16 bytes at a time.
  void features(char const* name, int64_t size, Format format) {
    int const multiple = 16 / element_bytes(format);
    if (size > 0 && size % multiple == 0) return;
    that(false, std::string(name) + "=" + std::to_string(size) + " is not a positive multiple of " + std::to_string(multiple));
  }

  // The error text of another function, empty if it succeeded.
  void operator()(std::string const& error) { that(error.empty(), error); }

  bool ok() const { return error_.empty(); }
  std::string const& error() const { return error_; }

 private:
  std::string error_;
};

inline ffi::DataType data_type(Format format) {
  switch (format) {
    case Format::kBf16:
    case Format::kBf16Codes:
      return ffi::DataType::BF16;
    case Format::kF16:
      return ffi::DataType::F16;
    case Format::kE4m3:
      return ffi::DataType::U8;  // JAX gives arrays of 8-bit floats gradients, so codes are bytes
  }
  return ffi::DataType::INVALID;
}

}  // namespace latent_moe
