#include "sides.h"

#include <array>
#include <mutex>
#include <vector>

namespace latent_moe {
namespace {

constexpr int kLines = 64;
constexpr int kLineInts = 1056;  // 4 KB and a bit more: homes change every few KB
constexpr int kChain = 4, kRounds = 6;
constexpr int kAlone = 200 * 1024;  // bytes of shared memory that keep other blocks off a multiprocessor
constexpr int kDevices = 64;

__device__ int lines[kLines][kLineInts];
__device__ uint32_t cycles[Sides::kMost][kLines];

// Cycles of a chain of atomics on each line.
__global__ void time_atomics() {
  uint32_t sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  for (int line = 0; line < kLines; ++line) {
    uint32_t best = ~0u;
    for (int round = 0; round < kRounds; ++round) {
      int* at = lines[line];
      uint32_t const start = clock();
      for (int i = 0; i < kChain; ++i) {
        int old;
        asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 0;" : "=r"(old) : "l"(at) : "memory");
        at += old;  // always 0: the next waits for this one
      }
      if (at != lines[line]) __trap();
      best = min(best, static_cast<uint32_t>(clock()) - start);
    }
    if (sm < Sides::kMost) cycles[sm][line] = best;
  }
}

// Splits the multiprocessors by the sign of the strongest pattern in what is left of their times when that of the
// multiprocessor and that of the line are taken off.
Sides split(uint32_t const (&times)[Sides::kMost][kLines], int count) {
  std::vector<std::array<double, kLines>> rest(count);
  std::array<double, kLines> of_line = {};
  for (int sm = 0; sm < count; ++sm) {
    double mean = 0;
    for (int line = 0; line < kLines; ++line) mean += times[sm][line] / double{kLines};
    for (int line = 0; line < kLines; ++line) {
      rest[sm][line] = times[sm][line] - mean;
      of_line[line] += rest[sm][line] / count;
    }
  }
  for (auto& row : rest) {
    for (int line = 0; line < kLines; ++line) row[line] -= of_line[line];
  }
  std::array<double, kLines> pattern = rest[0];
  Sides sides = {};
  for (int round = 0; round < 8; ++round) {
    sides = {};
    std::array<double, kLines> next = {};
    for (int sm = 0; sm < count; ++sm) {
      double product = 0;
      for (int line = 0; line < kLines; ++line) product += rest[sm][line] * pattern[line];
      if (product < 0) sides.bits[sm / 32] |= 1u << sm % 32;
      for (int line = 0; line < kLines; ++line) next[line] += product < 0 ? -rest[sm][line] : rest[sm][line];
    }
    pattern = next;
  }
  return sides;
}

cudaError_t measure(int device, cudaStream_t stream, Sides& sides) {
  int count = 0;
  if (auto error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return error;
  if (count > Sides::kMost) return cudaSuccess;
  if (auto error = cudaFuncSetAttribute(time_atomics, cudaFuncAttributeMaxDynamicSharedMemorySize, kAlone)) return error;
  time_atomics<<<count, 1, kAlone, stream>>>();
  if (auto error = cudaGetLastError()) return error;
  static uint32_t times[Sides::kMost][kLines];
  if (auto error = cudaMemcpyFromSymbolAsync(times, cycles, sizeof(times), 0, cudaMemcpyDeviceToHost, stream)) {
    return error;
  }
  if (auto error = cudaStreamSynchronize(stream)) return error;
  sides = split(times, count);
  return cudaSuccess;
}

std::array<Sides, kDevices> measured = {};

}  // namespace

cudaError_t measure_sides(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::array<bool, kDevices> done = {};
  std::lock_guard<std::mutex> lock(mutex);
  if (device >= kDevices || done[device]) return cudaSuccess;
  auto const error = measure(device, stream, measured[device]);
  done[device] = error == cudaSuccess;
  return error;
}

Sides const& sides_of(int device) { return measured[device < kDevices ? device : 0]; }

}  // namespace latent_moe
