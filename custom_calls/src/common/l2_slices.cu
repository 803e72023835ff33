#include "common/l2_slices.h"

#include <array>
#include <mutex>
#include <vector>

namespace latent_moe {
namespace {

constexpr int kLines = 64;
constexpr int kLineInts = 1056;  // a bit more than 4 KB: every few KB, addresses are of another slice
constexpr int kChain = 4, kRounds = 6;
constexpr int kDevices = 64;

__device__ int lines[kLines][kLineInts];
__device__ uint32_t cycles[L2Slices::kMaxSms][kLines];

// Measures the cycles of a chain of atomics on each line.
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
        at += old;  // always 0, but the next atomic has to wait for it
      }
      if (at != lines[line]) __trap();
      best = min(best, static_cast<uint32_t>(clock()) - start);
    }
    if (sm < L2Slices::kMaxSms) cycles[sm][line] = best;
  }
}

// Splits the SMs by the strongest pattern in their times, after subtracting the mean of each SM and of each line. The sign
// of an SM's product with the pattern decides its slice. The next pattern is the sum of the SMs' times with these signs.
L2Slices split(uint32_t const (&times)[L2Slices::kMaxSms][kLines], int count) {
  std::vector<std::array<double, kLines>> rest(count);
  std::array<double, kLines> line_mean = {};
  for (int sm = 0; sm < count; ++sm) {
    double mean = 0;
    for (int line = 0; line < kLines; ++line) mean += times[sm][line] / double{kLines};
    for (int line = 0; line < kLines; ++line) {
      rest[sm][line] = times[sm][line] - mean;
      line_mean[line] += rest[sm][line] / count;
    }
  }
  for (auto& row : rest) {
    for (int line = 0; line < kLines; ++line) row[line] -= line_mean[line];
  }
  std::array<double, kLines> pattern = rest[0];
  L2Slices slices = {};
  for (int round = 0; round < 8; ++round) {
    slices = {};
    std::array<double, kLines> next = {};
    for (int sm = 0; sm < count; ++sm) {
      double product = 0;
      for (int line = 0; line < kLines; ++line) product += rest[sm][line] * pattern[line];
      if (product < 0) slices.bits[sm / 32] |= 1u << sm % 32;
      for (int line = 0; line < kLines; ++line) next[line] += product < 0 ? -rest[sm][line] : rest[sm][line];
    }
    pattern = next;
  }
  return slices;
}

cudaError_t measure(int device, cudaStream_t stream, L2Slices& slices) {
  int count = 0;
  if (auto error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return error;
  if (count > L2Slices::kMaxSms) return cudaSuccess;
  // Each block takes all shared memory that a block may have, so that no two run on one SM.
  int all = 0;
  if (auto error = cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  if (auto error = cudaFuncSetAttribute(time_atomics, cudaFuncAttributeMaxDynamicSharedMemorySize, all)) return error;
  time_atomics<<<count, 1, all, stream>>>();
  if (auto error = cudaGetLastError()) return error;
  static uint32_t times[L2Slices::kMaxSms][kLines];
  if (auto error = cudaMemcpyFromSymbolAsync(times, cycles, sizeof(times), 0, cudaMemcpyDeviceToHost, stream)) {
    return error;
  }
  if (auto error = cudaStreamSynchronize(stream)) return error;
  slices = split(times, count);
  return cudaSuccess;
}

std::array<L2Slices, kDevices> measured = {};

}  // namespace

cudaError_t measure_l2_slices(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::array<bool, kDevices> done = {};
  std::lock_guard<std::mutex> lock(mutex);
  if (device >= kDevices || done[device]) return cudaSuccess;
  auto const error = measure(device, stream, measured[device]);
  done[device] = error == cudaSuccess;
  return error;
}

L2Slices const& l2_slices_of(int device) { return measured[device < kDevices ? device : 0]; }

}  // namespace latent_moe
