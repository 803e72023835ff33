// A block of a CUDA kernel on the CPU, for tests: each thread is a coroutine that runs to its next barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__

using std::max;
using std::min;

namespace emulation {

enum class Wait { kNothing, kWarp, kBlock, kEnd };

struct Thread {
  ucontext_t context;
  jmp_buf place;  // jumps, unlike switches of contexts, make no system call
  bool started;
  std::unique_ptr<char[]> stack;
  Wait wait;
  uint3 index;
};

inline jmp_buf scheduler;
inline std::vector<Thread> threads;
inline Thread* current;
inline std::function<void()> body;

inline void wait_for(Wait what) {
  current->wait = what;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

inline void start() {
  body();
  wait_for(Wait::kEnd);
}

// Releases threads that all wait for the same barrier. Threads at different barriers would hang on a GPU.
inline void release(size_t first, size_t last, Wait barrier) {
  const auto begin = threads.begin() + first, end = threads.begin() + last;
  const auto waits = std::count_if(begin, end, [&](Thread const& t) { return t.wait == barrier; });
  const auto ended = std::count_if(begin, end, [&](Thread const& t) { return t.wait == Wait::kEnd; });
  if (waits == 0 || waits + ended < std::ptrdiff_t(last - first)) return;
  std::for_each(begin, end, [&](Thread& t) { t.wait = t.wait == barrier ? Wait::kNothing : t.wait; });
}

inline void run_block(int count, std::function<void()> const& kernel) {
  constexpr size_t kStack = 128 << 10;
  threads.resize(count);
  body = kernel;
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.index = make_uint3(i, 0, 0);
    thread.wait = Wait::kNothing;
    thread.started = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, start, 0);
  }
  for (volatile bool moved = true; moved;) {
    moved = false;
    for (volatile int i = 0; i < count; ++i) {  // volatile, as it is read after a jump
      Thread& thread = threads[i];
      if (thread.wait != Wait::kNothing) continue;
      moved = true;
      current = &thread;
      if (_setjmp(scheduler) != 0) continue;
      if (thread.started) _longjmp(thread.place, 1);
      thread.started = true;
      setcontext(&thread.context);
    }
    for (int warp = 0; warp < count; warp += 32) release(warp, warp + 32, Wait::kWarp);
    release(0, count, Wait::kBlock);
    moved = moved || std::any_of(threads.begin(), threads.end(), [](Thread& t) { return t.wait == Wait::kNothing; });
  }
  for (Thread& thread : threads) {
    if (thread.wait != Wait::kEnd) std::fprintf(stderr, "threads wait at different barriers\n"), std::abort();
  }
}

// What each lane of the warp gives, by lane.
template <class T>
std::vector<T> of_warp(T const& mine) {
  static std::vector<T> given(1024);
  const unsigned at = current->index.x, warp = at / 32 * 32;
  given[at] = mine;
  wait_for(Wait::kWarp);
  const std::vector<T> found(given.begin() + warp, given.begin() + warp + 32);
  wait_for(Wait::kWarp);
  return found;
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
inline uint3 blockIdx;
inline dim3 gridDim, blockDim;

inline void __syncthreads() { emulation::wait_for(emulation::Wait::kBlock); }
inline void __threadfence() {}

// One kernel ends before the next one starts. What its results are until a block waits for that is in unfinished.h.
namespace emulation {
inline std::function<void()> end_of_kernel_before;
inline bool waited, triggers_after_wait;  // the second: the next kernel reads results of the one before this one
}  // namespace emulation
inline void cudaTriggerProgrammaticLaunchCompletion() {
  if (!emulation::triggers_after_wait || emulation::waited) return;
  std::fprintf(stderr, "the next kernel is launched before this one has waited\n"), std::abort();
}
inline void cudaGridDependencySynchronize() {
  emulation::waited = true;
  if (emulation::end_of_kernel_before) emulation::end_of_kernel_before();
}

inline uint32_t __ballot_sync(uint32_t, bool mine) {
  uint32_t mask = 0;
  const auto all = emulation::of_warp<int>(mine);
  for (int lane = 0; lane < 32; ++lane) mask |= uint32_t(all[lane]) << lane;
  return mask;
}

inline bool __any_sync(uint32_t mask, bool mine) { return __ballot_sync(mask, mine) != 0; }

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  return emulation::of_warp<T>(value)[lane];
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return emulation::of_warp<T>(value)[threadIdx.x % 32 ^ mask];
}

template <class T>
T __shfl_up_sync(uint32_t, T value, int lanes) {
  const int lane = threadIdx.x % 32;
  return emulation::of_warp<T>(value)[lane >= lanes ? lane - lanes : lane];
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  const auto all = emulation::of_warp<uint32_t>(value);
  return *std::max_element(all.begin(), all.end());
}

inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  const auto all = emulation::of_warp<uint32_t>(value);
  return *std::min_element(all.begin(), all.end());
}

inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  uint32_t found = 0;
  for (const uint32_t given : emulation::of_warp<uint32_t>(value)) found |= given;
  return found;
}

inline int __reduce_add_sync(uint32_t, int value) {
  int sum = 0;
  for (const int given : emulation::of_warp<int>(value)) sum += given;
  return sum;
}

inline void __syncwarp() { emulation::wait_for(emulation::Wait::kWarp); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return found;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t{high} << 32 | low) >> shift % 32);
}

inline float __uint_as_float(uint32_t bits) {
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t found;
  std::memcpy(&found, &value, sizeof found);
  return found;
}

inline uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }

inline float __frcp_rn(float x) { return 1 / x; }

inline uint4 __ldcs(uint4 const* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::fprintf(stderr, "an address is not aligned\n"), std::abort();
  return *from;
}

template <class T>
T __ldg(T const* from) {
  return *from;
}

template <class T>
T __ldcg(T const* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::fprintf(stderr, "an address is not aligned\n"), std::abort();
  return *from;
}

inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
