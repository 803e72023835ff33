// A persistent, warp-specialised kernel for bfloat16 rows that are sorted by expert, times a weight in codes.
//
// Features of the weight lie along wgmma's M axis, because its first operand may come from registers: codes go through shared
// memory to registers, where they are widened (fragments.cuh). Rows lie along the N axis, in shared memory. Two or three
// warpgroups multiply the same rows by 64 features each. While products of one part of a step run, a warpgroup widens the next
// part. Three overlap more, as some of their instructions for a product wait for the one before.
//
// One warp copies rows to a ring of stages through TMA, another one codes to a ring of their own, so that codes may be further
// ahead: tiles of few rows are bound by reading them. An expert may end at any row. TMA clips the boxes there (`Window`).
#pragma once

#include "common/gather.cuh"
#include "common/queue.cuh"
#include "common/schedule.cuh"
#include "sm90/fragments.cuh"
#include "sm90/spec.h"
#include "sm90/widened_epilogue.cuh"

namespace latent_moe::sm90 {

template <class Spec>
struct WidenedKernel {
  static constexpr Tile kTile = Spec::kTile;
  static constexpr int kConsumers = Spec::kConsumers, kConsumerWarps = kConsumers * 4;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  using T = Element<Spec::kFormat>;
  using Epilogue = WidenedEpilogue<Spec>;
  using Schedule = latent_moe::Schedule<typename Spec::Tiles>;
  using Queue = latent_moe::Queue<Schedule, 1, kConsumerWarps + 2, true>;  // for the warps that multiply, and two that copy
  static constexpr bool kHalves = Spec::kHalves;
  static constexpr int kStages = kTile.stages, kCodeStages = kConsumers == 2 ? 4 : 3;
  static constexpr int kRowBlocks = kTile.rows / kBlock;  // blocks of 64 rows
  static constexpr int kBlockBytes = kBlock * kRowBytes, kStageBytes = kRowBlocks * kBlockBytes;
  static constexpr int kCodeStageBytes = kTile.columns * kRowBytes;
  static constexpr int kBarrierBytes = 2 * (kStages + kCodeStages) * sizeof(uint64_t);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 56, kConsumerRegisters = kConsumers == 2 ? 232 : 152;
  // Two warpgroups have registers for more elements than three.
  static constexpr int kPartElements = kConsumers == 2 ? 64 : 32;
  static constexpr int kParts = kStepElements / kPartElements, kStageParts = kBlock / kPartElements;  // of a step and a stage
  template <Code C>
  using FragmentsOf = Fragments<C, kHalves, kTile.columns, kPartElements>;
  static_assert(Spec::kStepDepth == kStepElements);

  static constexpr int shared_bytes(int num_experts) {
    return kStages * kStageBytes + kCodeStages * kCodeStageBytes + Epilogue::kSharedBytes + kBarrierBytes +
           Queue::kSharedBytes + Schedule::shared_bytes(num_experts);
  }

  // The layout of shared memory.
  struct Shared {
    char* rows;
    char* codes;
    char* epilogue;
    char* queue;
    Barrier* full;
    Barrier* empty;
    Barrier* full_codes;
    Barrier* empty_codes;
    int* schedule;

    __device__ explicit Shared(char* base) {
      rows = base;
      codes = rows + kStages * kStageBytes;
      epilogue = codes + kCodeStages * kCodeStageBytes;
      queue = epilogue + Epilogue::kSharedBytes;
      full = reinterpret_cast<Barrier*>(queue + Queue::kSharedBytes);
      empty = full + kStages;
      full_codes = empty + kStages;
      empty_codes = full_codes + kCodeStages;
      schedule = reinterpret_cast<int*>(empty_codes + kCodeStages);
    }
  };

  // A position in a ring, and the parity of its rounds.
  template <int Stages>
  struct Place {
    int stage = 0;
    uint32_t phase = 0;

    __device__ void next() {
      if (++stage == Stages) stage = 0, phase ^= 1;
    }
  };

  // One thread copies the rows of tiles.
  static __device__ __forceinline__ void load_rows(Args const& args, Shared const& shared, Schedule const& schedule) {
    Queue queue(shared.queue, schedule, 0);
    Place<kStages> place;
    Work work;
    while (queue.template take<true>(work)) {
      if (args.gather.table != nullptr) fence_tma();
      const int blocks = min(kRowBlocks, ceil_div(work.valid, kBlock));
      for (int at = 0; at < work.steps * kStepElements; at += kBlock, place.next()) {
        Barrier& full = shared.full[place.stage];
        shared.empty[place.stage].wait(place.phase ^ 1);
        full.arrive_and_expect_tx(blocks * kBlockBytes);
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
          if (block >= blocks) continue;
          const int first = block * kBlock;
          const Window window(work.row + first, min(kBlock, work.valid - first));
          load_box<1>(args.a, full, shared.rows + place.stage * kStageBytes + block * kBlockBytes, 0, at, window.y, window.z,
                      Window::kAxis);
        }
      }
    }
  }

  // One warp copies the codes of tiles, 128 bytes of each feature to a stage.
  static __device__ __forceinline__ void load_codes(Args const& args, Shared const& shared, Schedule const& schedule) {
    Queue queue(shared.queue, schedule, 0);
    Place<kCodeStages> place;
    Work work;
    const int bytes = args.weight.k / packing(args.weight.code);
    while (queue.template take<false>(work)) {
      if (work.steps > 0) prefetch_scales(args.weight, work);
      const int end = work.steps > 0 ? bytes : 0;
      for (int at = 0; at < end; at += kRowBytes, place.next()) {
        Barrier& full = shared.full_codes[place.stage];
        shared.empty_codes[place.stage].wait(place.phase ^ 1);
        if (cute::elect_one_sync()) {
          char* to = shared.codes + place.stage * kCodeStageBytes;
          full.arrive_and_expect_tx(kCodeStageBytes);
          if constexpr (kHalves) {
            load_box<1>(args.b, full, to, 0, at, work.column, 2 * work.expert);
            load_box<1>(args.b, full, to + kCodeStageBytes / 2, 0, at, work.column, 2 * work.expert + 1);
          } else {
            load_box<1>(args.b, full, to, 0, at, work.column, work.expert);
          }
        }
        __syncwarp();
      }
    }
  }

  // Asks for the scales of a tile to be in the L2 cache by the time that other warps load them.
  static __device__ __forceinline__ void prefetch_scales(Weight const& weight, Work const& work) {
    if (packing(weight.code) == 1) return;
    const int bytes = (weight.k >> weight.k_shift) * (weight.code == Code::kInt4 ? 2 : 1);  // of a feature
    constexpr int kColumns = Spec::kColumns, kLine = 128;
#pragma unroll 1
    for (int half = 0; half < 1 + kHalves; ++half) {
      const int64_t first = (int64_t{work.expert} * (1 + kHalves) + half) * weight.n + work.column;
      auto const* from = static_cast<char const*>(weight.scales) + first * bytes;
      const int size = min(kColumns, weight.n - work.column) * bytes;
      for (int at = threadIdx.x % 32 * kLine; at < size; at += 32 * kLine) prefetch_line(from + at);
    }
  }

  // Calls `with` for the rows of a tile, rounded up to one of four heights. More comparisons would take more time than the
  // products that they save.
  template <class With>
  static __device__ __forceinline__ void of_height(int rows, With const& with) {
    constexpr int kThird = kTile.rows == 256 ? 192 : 160;
    if (rows <= 128) {
      rows <= 64 ? with(std::integral_constant<int, 64>{}) : with(std::integral_constant<int, 128>{});
    } else {
      rows <= kThird ? with(std::integral_constant<int, kThird>{}) : with(std::integral_constant<int, kTile.rows>{});
    }
  }

  // The products of a tile: of this warpgroup's features and the rows of the stages. Only the instruction depends on the
  // number of rows. If the whole loop did, the compiler would find too few registers for all of them.
  template <Code C>
  static __device__ __forceinline__ void multiply(Shared const& shared, Work const& work, FragmentsOf<C>& fragments,
                                                  typename FragmentsOf<C>::Fragment (&fragment)[2],
                                                  float (&acc)[kTile.rows / 2], Place<kStages>& place,
                                                  Place<kCodeStages>& codes, uint32_t lane) {
    const uint32_t first = operand(cute::cast_smem_ptr_to_uint(shared.rows), 0);
    const uint32_t first_codes = cute::cast_smem_ptr_to_uint(shared.codes);
    const auto issue = [&](auto const& fragment, int part) {
      if (part % kStageParts == 0) shared.full[place.stage].wait(place.phase);
      const uint32_t stage = uniform(first + place.stage * (kStageBytes >> 4));
      of_height(work.valid, [&](auto n) {
        cute::warpgroup_arrive();
#pragma unroll
        for (int k16 = 0; k16 < kPartElements / 16; ++k16) {
          const int at = part % kStageParts * (kPartElements / 16) + k16;
          fragment_wgmma<n()>(fragment[k16], descriptor(stage, bytes_to<Major::K>(at)), acc);
        }
        cute::warpgroup_commit_batch();
      });
    };
    const auto release = [&](int stage) {
      if (lane == 0) shared.empty[stage].arrive();
    };
    const auto read = [&](auto& found, int step, int part) {
      fragments.read(found, first_codes + codes.stage * kCodeStageBytes, step % kStageSteps<C>, part);
    };
    // A warpgroup without features only gives the stages back.
    if (fragments.is_idle()) {
      for (int step = 0; step < work.steps; ++step) {
        for (int part = 0; part < kParts; part += kStageParts, place.next()) {
          shared.full[place.stage].wait(place.phase);
          release(place.stage);
        }
        if (step + 1 == work.steps || (step + 1) % kStageSteps<C> == 0) {
          shared.full_codes[codes.stage].wait(codes.phase);
          if (lane == 0) shared.empty_codes[codes.stage].arrive();
          codes.next();
        }
      }
      return;
    }
    // The first part is widened already. While products of a part run, the next one is widened. Its codes are read before the
    // products are issued.
    typename FragmentsOf<C>::Codes found;
    int previous = -1;
#pragma unroll 1
    for (int step = 0;; ++step) {
      const bool ends = step + 1 == work.steps, ends_stage = ends || (step + 1) % kStageSteps<C> == 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int stage = codes.stage;
        if (part + 1 < kParts) {
          read(found, step, part + 1);
        } else {
          if (ends_stage) codes.next();
          if (!ends) {
            if (ends_stage) shared.full_codes[codes.stage].wait(codes.phase);
            read(found, step + 1, 0);
          }
        }
        issue(fragment[part % 2], part);
        // The products depend on all that the warp has read from the last stage of codes.
        if (part + 1 == kParts && ends_stage && lane == 0) shared.empty_codes[stage].arrive();
        cute::warpgroup_wait<1>();
        if (part % kStageParts == 0) {
          if (previous >= 0) release(previous);
          previous = place.stage;
        }
        if ((part + 1) % kStageParts == 0) place.next();
        if (part + 1 < kParts) {
          fragments.widen(fragment[(part + 1) % 2], found, part + 1);
        } else if (!ends) {
          fragments.take(step + 1);
          fragments.widen(fragment[0], found, 0);
        }
      }
      if (ends) break;
    }
    cute::warpgroup_wait<0>();
    release(previous);
  }

  template <Code C>
  static __device__ __forceinline__ void consume(Args const& args, Shared const& shared, Schedule const& schedule,
                                                 int warpgroup) {
    const int thread = __shfl_sync(~0u, threadIdx.x % kWarpgroup, threadIdx.x % 32);
    const uint32_t lane = unsigned(thread) % 32;
    const Epilogue epilogue(args, shared.epilogue, warpgroup, thread);
    FragmentsOf<C> fragments(args.weight, warpgroup, thread);
    Queue queue(shared.queue, schedule, 0);
    Place<kStages> place;
    Place<kCodeStages> codes;
    Work work;
    const auto take = [&] {
      const bool more = queue.template take<false>(work);
      work.steps = uniform(work.steps);
      work.valid = uniform(work.valid);
      if (more && work.steps > 0) fragments.begin(work.expert, work.column);
      return more;
    };
    // Widens the first part of a tile.
    typename FragmentsOf<C>::Fragment fragment[2];
    const auto begin = [&] {
      if (work.steps == 0 || fragments.is_idle()) return;
      typename FragmentsOf<C>::Codes found;
      shared.full_codes[codes.stage].wait(codes.phase);
      fragments.read(found, cute::cast_smem_ptr_to_uint(shared.codes) + codes.stage * kCodeStageBytes, 0, 0);
      fragments.take(0);
      fragments.widen(fragment[0], found, 0);
    };
    bool more = take();
    if (more) begin();
    while (more) {
      float acc[kTile.rows / 2] = {};
      const Work done = work;
      float scales[2] = {};
      if (done.steps > 0) {
        multiply<C>(shared, done, fragments, fragment, acc, place, codes, lane);
        scales[0] = fragments.of_sum(0), scales[1] = fragments.of_sum(1);
      }
      more = take();
      if (more) begin();  // before the epilogue, behind which the first products can then start at once
      epilogue.template finish<FragmentsOf<C>::kScalesSums>(acc, scales, done);
      __syncwarp();  // without it the compiler forgets which values are the same for the whole warp
    }
  }
};

// The codes are an argument of the template: in one function with the products of all codes, the compiler would find too few
// registers, and would wait for each product.
template <class Spec, Code C>
__global__ void __launch_bounds__(WidenedKernel<Spec>::kThreads, 1) widened_kernel(__grid_constant__ const Args args) {
  using K = WidenedKernel<Spec>;
  extern __shared__ __align__(1024) char base[];  // swizzled blocks begin at multiples of 1024 bytes
  // If the compiler knows that an address is the same for the whole warp, it keeps it out of the lanes' registers.
  const uint32_t start = uniform(cute::cast_smem_ptr_to_uint(base));
  const typename K::Shared shared(static_cast<char*>(__cvta_shared_to_generic(start)));
  const int warpgroup = threadIdx.x / kWarpgroup;

  const typename K::Schedule schedule(args.problem, shared.schedule);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < K::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(K::kConsumerWarps);
    }
    for (int stage = 0; stage < K::kCodeStages; ++stage) {
      shared.full_codes[stage].init(1);
      shared.empty_codes[stage].init(K::kConsumerWarps);
    }
    typename K::Queue(shared.queue, schedule, 0).init();
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == K::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<K::kProducerRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    // The compiler knows that an elected thread is a single one, so it emits no loop over the threads that use TMA.
    if (warp == 0 && cute::elect_one_sync()) K::load_rows(args, shared, schedule);
    if (warp == 1 && cute::elect_one_sync()) typename K::Queue(shared.queue, schedule, 0).serve(args);
    if (warp == 2) K::load_codes(args, shared, schedule);
    if (warp == 3 && args.gather.table != nullptr) {
      gather_rows<typename K::T>(args.gather, args.problem.num_rows, takes_last_first(args.l2_slices));
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<K::kConsumerRegisters>();
    K::template consume<C>(args, shared, schedule, uniform(warpgroup));
  }
}

template <class Spec, Code C>
cudaError_t launch(Args const& args, int num_sms, cudaStream_t stream) {
  using K = WidenedKernel<Spec>;
  auto const kernel = widened_kernel<Spec, C>;
  const int shared_bytes = K::shared_bytes(args.problem.num_experts);
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) return error;
  if (auto error = cudaMemsetAsync(args.counter, 0, args.counter_bytes, stream)) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = num_sms;  // all blocks run at once
  config.blockDim = K::kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <class Spec>
cudaError_t launch(Args const& args, int num_sms, cudaStream_t stream) {
  switch (args.weight.code) {
    case Code::kE4m3:
      return launch<Spec, Code::kE4m3>(args, num_sms, stream);
    case Code::kInt8:
      return launch<Spec, Code::kInt8>(args, num_sms, stream);
    case Code::kMxfp4:
      return launch<Spec, Code::kMxfp4>(args, num_sms, stream);
    case Code::kNvfp4:
      return launch<Spec, Code::kNvfp4>(args, num_sms, stream);
    case Code::kInt4:
      return launch<Spec, Code::kInt4>(args, num_sms, stream);
    case Code::kDense:
      break;
  }
  return cudaErrorInvalidValue;
}

template <class Spec>
int max_experts() {
  using K = WidenedKernel<Spec>;
  static_assert(K::shared_bytes(1) <= kSharedMemory);
  return (kSharedMemory - K::shared_bytes(0)) / (K::shared_bytes(1) - K::shared_bytes(0));
}

}  // namespace latent_moe::sm90
