// The kernel of both products of listed rows, and which instance of it a call takes.
#pragma once

#include "decode/listed.cuh"

namespace latent_moe::decode {

constexpr int kMemoryOfSm = 228 << 10, kReserved = 1 << 10;  // bytes of shared memory; kReserved: what CUDA takes of a block

template <class Stream>
__global__ void __launch_bounds__(Stream::kThreads, Stream::kBlocks) multiply_listed_rows(Listed listed) {
  __shared__ typename Stream::Shared shared;
  Stream(listed, shared).run();
}

// The most bytes of dynamic shared memory with which an SM holds all blocks of a kernel. 256 are enough for share_of_block.
template <class Stream>
constexpr int kMostBytes = (kMemoryOfSm / Stream::kBlocks - kReserved - int(sizeof(typename Stream::Shared)) - 256) / 16 * 16;

template <class Stream, class Launch>
cudaError_t launch_stream(Listed const& listed, int bytes, int most_bytes, Launch launch) {
  const dim3 grid(listed.num_sms * Stream::kBlocks);
  return launch(multiply_listed_rows<Stream>, grid, Stream::kThreads, bytes, most_bytes, listed);
}

template <Code C, int Pass, class Launch>
cudaError_t launch_pass(Listed listed, Launch launch) {
  using Kernel = Stream<C, Pass, 256, false>;
  Weight const& weight = listed.product.weight;
  // A lane has the features f of both parts, or f and f + 8.
  auto const blocks = [](int size, int shift) { return ((size - 1) >> shift) + 1; };
  const int64_t rows = weight.parts == 2 ? weight.n : 8;
  const int64_t scales = weight.parts == 2 ? blocks(weight.n, weight.n_shift) : weight.n_shift == 0 ? 8 : 0;
  listed.codes_apart = rows * weight.k / Kernel::Lane::kPacking;
  listed.scales_apart = scales * blocks(weight.k, weight.k_shift) * kScaleBytes<C>;
  if constexpr (kHasUnitScales<C>) {
    listed.unit_scales = unit_scales(weight, Kernel::rows_bytes(weight.k));
    // Small blocks wait for fewer warps when rows change. Large ones hold the rows fewer times in an SM.
    if (are_pieces(weight)) {
      using Small = Stream<C, Pass, 256, true>;
      const int bytes = bytes_with(listed.unit_scales, Small::kWarps);
      if (bytes <= kMostBytes<Small>) return launch_stream<Small>(listed, bytes, kMostBytes<Small>, launch);
    }
    if constexpr (Pass == 8) {
      using Large = Stream<C, Pass, 512, true>;
      const int bytes = bytes_with(listed.unit_scales, Large::kWarps);
      if (are_pieces(weight) && bytes <= kMostBytes<Large>) {
        return launch_stream<Large>(listed, bytes, kMostBytes<Large>, launch);
      }
    }
  }
  return launch_stream<Kernel>(listed, Kernel::rows_bytes(weight.k), Kernel::rows_bytes(Kernel::kPanel), launch);
}

// Calls launch(kernel, grid, threads, bytes, most bytes, argument) with the kernel of a product. It needs so many bytes of dynamic
// shared memory, and no call needs more than the most.
template <class Launch>
cudaError_t launch_listed(Listed const& listed, Launch launch) {
  auto const of_code = [&](auto code) {
    constexpr Code kCode = decltype(code)::value;
    return listed.pass == 8 ? launch_pass<kCode, 8>(listed, launch) : launch_pass<kCode, 16>(listed, launch);
  };
  switch (listed.product.weight.code) {
    case Code::kDense:
      break;
    case Code::kE4m3:
      return of_code(std::integral_constant<Code, Code::kE4m3>());
    case Code::kInt8:
      return of_code(std::integral_constant<Code, Code::kInt8>());
    case Code::kMxfp4:
      return of_code(std::integral_constant<Code, Code::kMxfp4>());
    case Code::kNvfp4:
      return of_code(std::integral_constant<Code, Code::kNvfp4>());
    case Code::kInt4:
      return of_code(std::integral_constant<Code, Code::kInt4>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace latent_moe::decode
