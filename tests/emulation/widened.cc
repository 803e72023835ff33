// Widens the codes of all tiles of a weight into a stage, as the widening warps do, and reads the stage in order.
#include <xmmintrin.h>

#include "cuda.h"

struct CUtensorMap {};

#include "sm90/code_stream.cuh"

namespace sm90 = latent_moe::sm90;
using latent_moe::Code, latent_moe::Weight;

namespace {

constexpr int kColumns = 128;

template <Code C, bool Halves>
void run(Weight const& weight, int experts, int columns, int steps, uint16_t* widened) {
  using Stream = sm90::CodeStream<C, Halves>;
  constexpr int kOfMatrix = Halves ? kColumns / 2 : kColumns;  // columns of a matrix in a tile
  constexpr int kRing = kColumns * sm90::kRowBytes;  // where the rings of codes begin
  std::memset(emulation::shared, 0xff, kRing + sm90::kCodeRingBytes);  // NaN
  for (int expert = 0; expert < experts; ++expert) {
    for (int column = 0; column < columns; column += kOfMatrix) {
      emulation::run_block(kColumns, [&] {
        // One group after the other widens its steps.
        for (int group = 0; group < sm90::kWideningGroups; ++group) {
          Stream stream(weight, kRing, group, threadIdx.x / 32, threadIdx.x % 32);
          latent_moe::Work work = {};
          work.expert = expert, work.column = column, work.steps = steps;
          stream.begin(work);
          for (int i = 0; i < group && !stream.ended(); ++i) stream.pass();
          const auto read = [&](int buffer) {
            if (stream.ended()) {
              stream.end();
            } else {
              stream.read(buffer);
              if (!stream.ended()) stream.pass();
            }
            sm90::commit_copies();
          };
          for (int ahead = 0; ahead < Stream::kAhead; ++ahead) read(ahead);
          int buffer = 0;
          for (int step = group; step < steps; step += sm90::kWideningGroups) {
            typename Stream::Step taken;
            sm90::wait_for_batches<Stream::kAhead - 1>();
            stream.take(taken, buffer);
            Stream::store(taken, stream.place());
            read(buffer);
            buffer = (buffer + 1) % Stream::kAhead;
            __syncthreads();
            // The 128-byte swizzle: 16 bytes of a row lie at their number, exclusive or that of the row in its eight.
            const int row = threadIdx.x, half = Halves ? row / kOfMatrix : 0;
            const int64_t matrix = Halves ? 2 * expert + half : expert, to = matrix * columns + column + row % kOfMatrix;
            for (int unit = 0; unit < 8; ++unit) {
              char const* from = emulation::shared + row * sm90::kRowBytes + (unit ^ row % 8) * 16;
              std::memcpy(widened + (to * steps + step) * sm90::kBlock + unit * 8, from, 16);
            }
            __syncthreads();
          }
          sm90::wait_for_batches<0>();
        }
      });
    }
  }
}
template <Code C>
void run(Weight const& weight, int experts, int columns, int steps, uint16_t* widened) {
  const auto with = weight.parts == 2 ? run<C, true> : run<C, false>;
  with(weight, experts, columns, steps, widened);
}

}  // namespace

// widened [experts][parts][columns][64 steps], with whole tiles of columns.
extern "C" void widen(Weight const* weight, int experts, int columns, int steps, uint16_t* widened) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before & ~0x8040u);  // XLA's threads read small numbers as 0, and a GPU does not
  constexpr decltype(&run<Code::kInt4>) kOf[] = {nullptr, run<Code::kE4m3>, run<Code::kInt8>, run<Code::kMxfp4>,
                                                 run<Code::kNvfp4>, run<Code::kInt4>};
  kOf[int(weight->code)](*weight, experts, columns, steps, widened);
  _mm_setcsr(before);
}

extern "C" float scale_of_sum(Weight const* weight, int64_t matrix, int column) {
  return sm90::scale_of_sum(*weight, matrix, column);
}
