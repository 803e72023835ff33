// Macros that export a function from the library, and that make it a handler that XLA calls.
#pragma once

#include "xla/ffi/api/ffi.h"

#define LATENT_MOE_EXPORT extern "C" __attribute__((visibility("default")))

#define LATENT_MOE_HANDLER(name, function, binding)                \
  LATENT_MOE_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* frame); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding, {xla::ffi::Traits::kCmdBufferCompatible});
