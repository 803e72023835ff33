// One persistent, warp-specialised kernel for the three contractions (fwd, dgrad, wgrad) of rows that are sorted by expert.
//
// A producer thread feeds a ring of shared-memory stages through TMA. Two consumer warpgroups alternate: while one
// multiplies a tile, the other stores the previous tile (CUTLASS calls it ping-pong). An expert may end at any row. TMA
// clips the boxes there (`Window`), because zeros need less power to multiply than rows of the next expert. Partial tiles
// are stored row by row. Other warps may gather rows from a table meanwhile (gather.cuh).
//
// Two or three warpgroups share a tile of E4M3 codes and take its 64-row blocks in turn. The matrix units add such products with
// about 14 bits. So each step, which is 128 elements of the contracted axis, is multiplied by itself, then scaled and added in
// float32, as DeepGEMM does (deep_gemm, sm90_fp8_gemm_1d2d). While one warpgroup adds or stores, the others multiply.
#pragma once

#include "common/gather.cuh"
#include "common/queue.cuh"
#include "common/schedule.cuh"
#include "sm90/encoded_epilogue.cuh"
#include "sm90/encoded_gradient_epilogue.cuh"
#include "sm90/row_epilogue.cuh"
#include "sm90/spec.h"
#include "sm90/swap_ab_epilogue.cuh"
#include "sm90/wgrad_epilogue.cuh"

namespace latent_moe::sm90 {

template <class Spec>
using RowEpilogueOf =
    std::conditional_t<Spec::kScaled && Spec::kDifferentiates, EncodedGradientEpilogue<Spec>, RowEpilogue<Spec>>;
template <class Spec>
using EpilogueOf = std::conditional_t<Spec::kWgrad, WgradEpilogue<Spec>,
                                      std::conditional_t<Spec::kSwapAb, SwapAbEpilogue<Spec>, RowEpilogueOf<Spec>>>;

template <class Spec>
struct GroupedKernel {
  static constexpr Tile kTile = Spec::kTile;
  static constexpr int kConsumers = Spec::kConsumers, kThreads = (kConsumers + 1) * kWarpgroup;
  using T = Element<Spec::kFormat>;
  using Epilogue = EpilogueOf<Spec>;
  using Schedule = latent_moe::Schedule<typename Spec::Tiles>;
  static constexpr bool kWgrad = Spec::kWgrad;
  static constexpr bool kDgrad = Spec::kContraction == Contraction::kDgrad;
  static constexpr Major kMajorA = kWgrad ? Major::MN : Major::K;
  static constexpr bool kScaled = Spec::kScaled;
  static constexpr Major kMajorB = kDgrad || kScaled ? Major::K : Major::MN;

  static constexpr int kCluster = kTile.cluster_rows * kTile.cluster_columns;
  static constexpr bool kCounts = Spec::kCounts;
  using Queue = latent_moe::Queue<Schedule, kCluster, kConsumers * 4 + 1 + kScaled, kCounts>;
  static constexpr int kBlocksA = kTile.rows / kBlock;     // 64-row blocks of the tile
  static constexpr int kBlocksB = kTile.columns / kBlock;  // 64-column blocks of the tile
  static constexpr int kDepth = Spec::kStepDepth;
  static constexpr int kStages = kWgrad ? kTile.stages * kBlock / kDepth : kTile.stages;
  static constexpr int kBlockBytes = (kWgrad ? kDepth : kBlock) * kRowBytes;
  static constexpr int kReaders = kScaled ? kConsumers * 4 : 1;  // warps, or a warpgroup, that free a stage
  static constexpr int kStageBytes = (kBlocksA + kBlocksB) * kBlockBytes;
  // The scales of a stage: of its rows, and of the weight's blocks that the columns of a tile may lie in. There are more of
  // these than needed, because the queue behind them begins at a multiple of 32 bytes.
  static constexpr int kWeightScales = 8;
  static constexpr int kHalves = Spec::kHalves ? 2 : 1;
  static constexpr int kScaleBytes = kScaled ? (kTile.rows + kWeightScales) * sizeof(float) : 0;
  static constexpr int kScaleLoaders = kScaled ? 32 : 0;  // threads
  static constexpr int kBarrierBytes = (2 * kStages + kConsumers) * sizeof(uint64_t);
  static_assert(kScaled ? kTile.rows * kTile.columns <= 256 * 128
                        : kTile.rows * kTile.columns <= 192 * 128 && kTile.rows <= 192 && kTile.columns <= 192,
                "the accumulators fill the registers");
  // Registers of a thread. All warpgroups' together are at most 504, or 512 with three consumers.
  static constexpr int kProducerRegisters = kScaled ? 56 : 40, kConsumerRegisters = kConsumers == 3 ? 152 : kScaled ? 224 : 232;
  static_assert(kLoadedRows == kBlock);
  static_assert(kWgrad || kTile.cluster_rows == 1, "only blocks of a weight gradient are stacked");

  static constexpr int shared_bytes(int num_experts) {
    return kStages * (kStageBytes + kScaleBytes) + Epilogue::kSharedBytes + kBarrierBytes + Queue::kSharedBytes +
           Schedule::shared_bytes(num_experts);
  }

  // The layout of shared memory.
  struct Shared {
    char* stages;
    char* epilogue;
    char* scales;
    char* queue;
    Barrier* full;
    Barrier* empty;
    Barrier* turn;
    int* schedule;

    __device__ explicit Shared(char* base) {
      stages = base;
      epilogue = stages + kStages * kStageBytes;
      scales = epilogue + Epilogue::kSharedBytes;
      queue = scales + kStages * kScaleBytes;
      full = reinterpret_cast<Barrier*>(queue + Queue::kSharedBytes);
      empty = full + kStages;
      turn = empty + kStages;
      schedule = reinterpret_cast<int*>(turn + kConsumers);
    }

    __device__ char* a(int stage, int block) const { return stages + stage * kStageBytes + block * kBlockBytes; }
    __device__ char* b(int stage, int block) const { return a(stage, kBlocksA + block); }
    // The scales of a stage of codes: of its rows, and of the weight by blocks of columns.
    __device__ float* row_scales(int stage) const { return reinterpret_cast<float*>(scales + stage * kScaleBytes); }
    __device__ float* weight_scales(int stage) const { return row_scales(stage) + kTile.rows; }
  };

  // A position in the ring of stages, and the parity of its rounds.
  struct Place {
    int stage = 0;
    uint32_t phase = 0;

    __device__ void next() {
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    __device__ void skip(int steps) {
      int to = stage + steps;
      phase ^= (to / kStages) & 1;
      stage = to % kStages;
    }
  };

  // The 64-row blocks of a tile that hold rows of the expert. The others are neither loaded nor multiplied.
  static __device__ __forceinline__ int active_blocks(Work const& work) {
    return kWgrad ? kBlocksA : min(kBlocksA, (work.valid + kBlock - 1) / kBlock);
  }

  static __device__ __forceinline__ void produce(Args const& args, Shared const& shared, Schedule const& schedule,
                                                 int rank) {
    const int rank_row = rank / kTile.cluster_columns, rank_column = rank % kTile.cluster_columns;
    // Blocks in one row of the cluster share A, blocks in one column share B.
    const uint16_t mask_a = ((1 << kTile.cluster_columns) - 1) << (rank_row * kTile.cluster_columns);
    uint16_t mask_b = 0;
    for (int r = 0; r < kTile.cluster_rows; ++r) mask_b |= 1 << (r * kTile.cluster_columns + rank_column);

    Queue queue(shared.queue, schedule, rank);
    Place place;
    Work work;
    while (queue.template take<true>(work)) {
      if (kCounts && args.gather.table != nullptr) fence_tma();
      const int blocks = active_blocks(work);
      const uint32_t bytes = (blocks + kBlocksB) * kBlockBytes;
      for (int step = 0; step < work.steps; ++step, place.next()) {
        Barrier& full = shared.full[place.stage];
        shared.empty[place.stage].wait(place.phase ^ 1);
        full.arrive_and_expect_tx(bytes);
        const int at = step * kDepth;
        if constexpr (kWgrad) {
          const Window window(work.row + at, min(kDepth, work.valid - at));
          load_wgrad<kTile.cluster_columns, kBlocksA>(args.a, args.whole_a, full, shared.a(place.stage, 0), mask_a,
                                                      rank_column, work.out_row, window);
          load_wgrad<kTile.cluster_rows, kBlocksB>(args.b, args.whole_b, full, shared.b(place.stage, 0), mask_b, rank_row,
                                                   work.column, window);
        } else {
#pragma unroll
          for (int block = 0; block < kBlocksA; ++block) {
            if (block % kTile.cluster_columns != rank_column || block >= blocks) continue;
            char* to = shared.a(place.stage, block);
            const int first = block * kBlock;
            const Window window(work.row + first, min(kBlock, work.valid - first));
            load_box<kTile.cluster_columns>(args.a, full, to, mask_a, at, window.y, window.z, Window::kAxis);
          }
          if constexpr (kMajorB == Major::K) {
            load_box<1>(args.b, full, shared.b(place.stage, 0), 0, at, work.column, work.expert);
            if constexpr (Spec::kHalves) {
              load_box<1>(args.b, full, shared.b(place.stage, kBlocksB / 2), 0, at, work.column + args.problem.out_columns,
                          work.expert);
            }
          } else {
            load_halves(args, full, shared.b(place.stage, 0), work, at);
          }
        }
      }
    }
  }

  // One warp copies the scales of codes beside the stages. They begin at any row, and TMA reads from multiples of 16 bytes.
  static __device__ __forceinline__ void load_scales(Args const& args, Shared const& shared, Schedule const& schedule,
                                                     int rank) {
    using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS<uint32_t>;
    const int lane = threadIdx.x % 32, num_rows = args.problem.num_rows;
    const int column_blocks = ceil_div(args.problem.out_columns, kScaleBlock);
    const auto copy = [](float const* from, float* to) {
      Copy::copy(*reinterpret_cast<uint32_t const*>(from), *reinterpret_cast<uint32_t*>(to));
    };
    Queue queue(shared.queue, schedule, rank);
    Place place;
    Work work;
    while (queue.template take<false>(work)) {
      // The tile of a gated activation has a block of gates and one of the up half.
      const int column_block = min(work.column / kScaleBlock + lane / kHalves, column_blocks - 1);
      const int64_t half = int64_t{work.expert} * kHalves + lane % kHalves;
      float const* of_weight = args.weight_scales + (half * column_blocks + column_block) * work.steps;
      for (int step = 0; step < work.steps; ++step, place.next()) {
        float const* of_rows = args.row_scales + int64_t{step} * num_rows;
        shared.empty[place.stage].wait(place.phase ^ 1);
#pragma unroll
        for (int row = 0; row < kTile.rows; row += 32) {
          copy(of_rows + min(work.row + row + lane, num_rows - 1), shared.row_scales(place.stage) + row + lane);
        }
        if (lane < kWeightScales) copy(of_weight + step, shared.weight_scales(place.stage) + lane);
        cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&shared.full[place.stage]));
      }
      __syncwarp();
    }
  }

  // Loads columns of an operand of wgrad, as [kDepth][64] blocks side by side. If the map is cut into blocks, one box loads
  // them, unless blocks of the cluster share the load.
  template <int Sharers, int Blocks>
  static __device__ __forceinline__ void load_wgrad(CUtensorMap const& map, bool whole, Barrier& full, char* smem,
                                                    uint16_t mask, int rank, int column, Window const& window) {
    if (Sharers == 1 && whole) {
      load_box<1>(map, full, smem, 0, 0, window.y, column / kBlock, window.z, Window::kAxis);
      return;
    }
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      if (block % Sharers != rank) continue;
      load_box<Sharers>(map, full, smem + block * kBlockBytes, mask, column + block * kBlock, window.y, window.z,
                        Window::kAxis);
    }
  }

  // Loads columns of w, as [64][64] blocks side by side. The tile of a gated activation is half gate, half up.
  static __device__ __forceinline__ void load_halves(Args const& args, Barrier& full, char* smem, Work const& work,
                                                     int row) {
    constexpr int kBlocks = kBlocksB / kHalves;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int column = work.column + half * args.problem.out_columns;
      char* to = smem + half * kBlocks * kBlockBytes;
      if (args.whole_b) {
        load_box<1>(args.b, full, to, 0, 0, row, column / kBlock, work.expert);
      } else {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          load_box<1>(args.b, full, to + block * kBlockBytes, 0, column + block * kBlock, row, work.expert);
        }
      }
    }
  }

  // The products of a tile. `multiply(stage, k16)` issues those of 16 elements of the contracted axis; `stage` is the
  // descriptor of a stage's first block. It passes the turn on when all are issued, and returns when all are done.
  template <class Multiply>
  static __device__ __forceinline__ void products(Shared const& shared, Work const& work, Place& place, int warpgroup,
                                                  int thread, Multiply const& multiply) {
    // The last step of a weight gradient may hold fewer rows.
    const int full_steps = kWgrad ? work.valid / kDepth : work.steps;
    const uint32_t first = operand(cute::cast_smem_ptr_to_uint(shared.stages), kBlockBytes);
    int previous = -1;
#pragma unroll 1
    for (int step = 0; step < full_steps; ++step, place.next()) {
      const uint32_t stage = first + place.stage * (kStageBytes >> 4);
      shared.full[place.stage].wait(place.phase);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k16 = 0; k16 < kDepth / 16; ++k16) multiply(stage, k16);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (previous >= 0) release(shared, previous, thread);
      previous = place.stage;
    }
    if (full_steps < work.steps) {
      const uint32_t stage = first + place.stage * (kStageBytes >> 4);
      shared.full[place.stage].wait(place.phase);
#pragma unroll 1
      for (int row = full_steps * kDepth; row < work.valid; row += 16) {
        cute::warpgroup_arrive();
        multiply(stage, row % kDepth / 16);
        cute::warpgroup_commit_batch();
      }
    }
    // By now every stage of this tile has been full. Only now may the other warpgroup wait for the next round of the same
    // stages, because barriers tell rounds apart only by parity. Products keep the four warps together, and where there was
    // none, a barrier does.
    if (work.steps == 0) sync_warpgroup(warpgroup);
    if (thread == 0) shared.turn[1 - warpgroup].arrive();
    cute::warpgroup_wait<0>();
    if (previous >= 0) release(shared, previous, thread);
    if (full_steps < work.steps) {
      release(shared, place.stage, thread);
      place.next();
    }
  }

  // Multiplies and stores a tile with rows in `Blocks` 64-row blocks.
  template <int Blocks>
  static __device__ __forceinline__ void tile(Args const& args, Shared const& shared, Epilogue const& epilogue,
                                              Work const& work, Place& place, uint32_t turn_phase, int warpgroup,
                                              int thread) {
    float acc[Blocks][kTile.columns / 2] = {};
    epilogue.begin(work);
    shared.turn[warpgroup].wait(turn_phase);
    products(shared, work, place, warpgroup, thread, [&](uint32_t stage, int k16) {
#pragma unroll
      for (int block = 0; block < Blocks; ++block) {
        wgmma<T, kTile.columns, kMajorA, kMajorB>(descriptor(stage, block * kBlockBytes + bytes_to<kMajorA>(k16)),
                                                  descriptor(stage, kBlocksA * kBlockBytes + bytes_to<kMajorB>(k16)),
                                                  acc[block]);
      }
    });
    epilogue.template finish<Blocks>(acc, work);
  }

  // Multiplies and stores a swap-AB tile. I8 are 0, 1, ...: one instruction for each number of rows, in eights.
  template <int... I8>
  static __device__ __forceinline__ void swap_ab_tile(Args const& args, Shared const& shared, Epilogue const& epilogue,
                                                      Work const& work, Place& place, uint32_t turn_phase, int warpgroup,
                                                      int thread, std::integer_sequence<int, I8...>) {
    float acc[kBlocksB][kTile.rows / 2] = {};
    const int eights = ceil_div(work.valid, 8);
    shared.turn[warpgroup].wait(turn_phase);
    const auto with = [&](auto n) {
      products(shared, work, place, warpgroup, thread, [&](uint32_t stage, int k16) {
        const uint64_t a = descriptor(stage, bytes_to<Major::K>(k16));
#pragma unroll
        for (int block = 0; block < kBlocksB; ++block) {
          const uint32_t at = (kBlocksA + block) * kBlockBytes + bytes_to<kMajorB>(k16);
          wgmma<T, n(), kMajorB, Major::K>(descriptor(stage, at), a, acc[block]);
        }
      });
    };
    ((eights == I8 + 1 ? with(std::integral_constant<int, 8 * (I8 + 1)>{}) : void()), ...);
    epilogue.finish(acc, work);
  }

  // Multiplies and stores this warpgroup's 64-row blocks of a tile of codes, `Blocks` in number. A step multiplies them one by
  // one, because two products and the sums would not fit the registers. So do the two halves of a gated tile.
  //
  // While one warpgroup adds a product, the others multiply. With three of them the matrix units hardly wait. Two would wait at
  // the same time, for a third of a step. So where the registers hold two products, the next step's is issued before one is
  // added.
  template <int Blocks>
  static __device__ __forceinline__ void scaled_tile(Args const& args, Shared const& shared, Epilogue const& epilogue,
                                                     Work const& work, Place& place, int warpgroup, int thread) {
    constexpr int kElements = Spec::kColumns / 2;  // of a thread, in a product
    // Columns that share a scale, wherever the tile begins.
    constexpr int kScaleColumns = Spec::kColumns % kScaleBlock == 0 ? kScaleBlock : kBlock;
    constexpr int kScales = Spec::kColumns / kScaleColumns, kProducts = Blocks * kHalves;
    constexpr bool kIssuesAhead = kConsumers == 2 && kProducts == 1 && kElements == 64;
    struct Scales {
      float of_rows[Blocks][2], of_columns[kHalves * kScales];
    };
    using Product = float[kElements];
    const uint32_t first = operand(cute::cast_smem_ptr_to_uint(shared.stages), kBlockBytes);
    // The compiler would compute the address of the thread's scales again in each step. It cannot repeat a shuffle.
    const uint32_t lane = unsigned(thread) % 32, own_row = warpgroup * kBlock + unsigned(thread) / 32 * kWarpRows + lane / 4;
    const uint32_t row = __shfl_sync(~0u, own_row, lane);
    const int column = kScaleColumns == kScaleBlock ? 0 : work.column % kScaleBlock;
    float sums[Blocks][kHalves][kElements] = {};
    float own_weight = 0.0f;
    if constexpr (Spec::kDifferentiates) own_weight = epilogue.begin(work, warpgroup);

    const auto multiply = [&](Product& product, int block, int half) {
      const uint32_t stage = first + place.stage * (kStageBytes >> 4), own = stage + warpgroup * (kBlockBytes >> 4);
      cute::warpgroup_arrive();
#pragma unroll
      for (int bytes = 0; bytes < kRowBytes; bytes += 32) {
        codes_wgmma<Spec::kColumns>(descriptor(own, block * kConsumers * kBlockBytes + bytes),
                                    descriptor(stage, (kBlocksA + half * kBlocksB / kHalves) * kBlockBytes + bytes), product,
                                    bytes > 0);
      }
      cute::warpgroup_commit_batch();
    };
    const auto read_scales = [&](Scales& scales) {
      const float* of_rows = shared.row_scales(place.stage) + row;
      const float* of_weight = shared.weight_scales(place.stage);
#pragma unroll
      for (int j = 0; j < 2 * Blocks; ++j) scales.of_rows[j / 2][j % 2] = of_rows[j / 2 * kConsumers * kBlock + j % 2 * 8];
#pragma unroll
      for (int j = 0; j < kHalves * kScales; ++j) {
        scales.of_columns[j] = of_weight[kHalves == 2 ? j : (column + j * kScaleColumns) / kScaleBlock];
      }
    };
    const auto add = [&](Product& product, Scales const& scales, int block, int half) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) cute::warpgroup_fence_operand(product[j]);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const float of_column = scales.of_columns[half * kScales + j / (kScaleColumns / 2)];
        sums[block][half][j] += product[j] * (scales.of_rows[block][j / 2 % 2] * of_column);
      }
    };
    const auto release = [&](int stage, Scales const& scales) {
      release_codes(shared, stage, thread, scales.of_rows, scales.of_columns);
    };

    if constexpr (kIssuesAhead) {
      Product products[2];
      Scales scales[2];
      const auto issue = [&](int which) {
        shared.full[place.stage].wait(place.phase);
        multiply(products[which], 0, 0);
        read_scales(scales[which]);
      };
      // Adds a product. `behind` is the number of products that are issued behind it.
      const auto finish = [&](int which, int stage, auto behind) {
        cute::warpgroup_wait<behind()>();
        release(stage, scales[which]);
        add(products[which], scales[which], 0, 0);
      };
      constexpr std::integral_constant<int, 0> kNone;
      constexpr std::integral_constant<int, 1> kOne;
      if (work.steps > 0) {
        issue(0);
        int step = 0;
#pragma unroll 1
        for (; step + 2 < work.steps; step += 2) {
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            const int stage = place.stage;
            place.next();
            issue(1 - which);
            finish(which, stage, kOne);
          }
        }
        const int stage = place.stage;
        place.next();
        if (step + 1 < work.steps) {
          issue(1);
          finish(0, stage, kOne);
          finish(1, place.stage, kNone);
          place.next();
        } else {
          finish(0, stage, kNone);
        }
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < work.steps; ++step, place.next()) {
        Scales scales;
        shared.full[place.stage].wait(place.phase);
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          Product product;
          multiply(product, i / kHalves, i % kHalves);
          if (i == 0) read_scales(scales);
          cute::warpgroup_wait<0>();
          if (i == kProducts - 1) release(place.stage, scales);
          add(product, scales, i / kHalves, i % kHalves);
        }
      }
    }
    if constexpr (Spec::kDifferentiates) {
      epilogue.store_block(sums[0][0], work, warpgroup, own_weight);
    } else if constexpr (Spec::kEncodes) {
      if (kHalves == 2 || args.codes != nullptr) {
        const EncodedEpilogue<Spec> encoded(args, shared.epilogue, warpgroup, thread);
#pragma unroll
        for (int block = 0; block < Blocks; ++block) encoded.store_block(sums[block], work, warpgroup + block * kConsumers);
        return;
      }
    }
    if constexpr (kHalves == 1 && !Spec::kDifferentiates) {
#pragma unroll
      for (int block = 0; block < Blocks; ++block) epilogue.store_block(sums[block][0], work, warpgroup + block * kConsumers);
    }
  }

  // Waits for the stages of a tile in which this warpgroup has no rows, and gives them back for all its warps. One warp does
  // it. Four could be rounds apart, because no product keeps them together, and barriers tell rounds apart by parity alone.
  static __device__ __forceinline__ void skip_tile(Shared const& shared, Work const& work, Place& place, int warpgroup,
                                                   int thread) {
    Place at = place;
    for (int step = 0; thread < 32 && step < work.steps; ++step, at.next()) {
      shared.full[at.stage].wait(at.phase);
      for (int warp = 0; warp < kWarpgroup / 32; ++warp) {
        if (thread < kCluster) shared.empty[at.stage].arrive(thread);
      }
      __syncwarp();
    }
    place.skip(work.steps);
    sync_warpgroup(warpgroup);
  }

  // Tells every producer of the cluster that this warp has read the stage and its scales. The scales must have arrived by
  // then, and no barrier waits for that (queue.cuh). So the number of the block depends on them: the shift is always 0.
  template <int Blocks, int Columns>
  static __device__ __forceinline__ void release_codes(Shared const& shared, int stage, uint32_t thread,
                                                       float const (&of_rows)[Blocks][2],
                                                       float const (&of_columns)[Columns]) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 2 * Blocks; ++i) bits |= __float_as_uint(of_rows[i / 2][i % 2]);
#pragma unroll
    for (int i = 0; i < Columns; ++i) bits |= __float_as_uint(of_columns[i]);
    const uint32_t lane = thread % 32, zero = bits & thread >> 10;
    if (lane < kCluster) shared.empty[stage].arrive(lane + zero);
  }

  // Tells every producer of the cluster that this warpgroup has read the stage.
  static __device__ __forceinline__ void release(Shared const& shared, int stage, int thread) {
    if (kCluster == 1) {
      if (thread == 0) shared.empty[stage].arrive();
    } else if (thread < kCluster) {
      shared.empty[stage].arrive(thread);
    }
  }

  static __device__ __forceinline__ void consume(Args const& args, Shared const& shared, Schedule const& schedule, int rank,
                                                 int warpgroup) {
    const int thread = __shfl_sync(~0u, threadIdx.x % kWarpgroup, threadIdx.x % 32);
    const Epilogue epilogue(args, shared.epilogue, warpgroup, thread);
    Queue queue(shared.queue, schedule, rank);
    Place place;
    Work work;
    int turn = 1;
    uint32_t turn_phase = warpgroup;  // flipped before each turn, so that the first warpgroup's first does not wait
    while (queue.template take<false>(work)) {
      work.steps = uniform(work.steps);
      work.valid = uniform(work.valid);
      if constexpr (kScaled) {
        // There are no turns within a tile: they made it slower.
        const int blocks = (active_blocks(work) + kConsumers - 1 - warpgroup) / kConsumers;
        if (blocks == 0) {
          skip_tile(shared, work, place, warpgroup, thread);
        } else if (constexpr int kMost = kBlocksA / kConsumers; kMost == 1 || blocks == kMost) {
          scaled_tile<kMost>(args, shared, epilogue, work, place, warpgroup, thread);
        } else {
          scaled_tile<1>(args, shared, epilogue, work, place, warpgroup, thread);
        }
      } else if ((turn ^= 1) != warpgroup) {
        place.skip(work.steps);
      } else {
        turn_phase ^= 1;
        if constexpr (Spec::kSwapAb) {
          constexpr std::make_integer_sequence<int, kTile.rows / 8> kHeights;
          swap_ab_tile(args, shared, epilogue, work, place, turn_phase, warpgroup, thread, kHeights);
        } else if (const int blocks = active_blocks(work); blocks == kBlocksA) {
          tile<kBlocksA>(args, shared, epilogue, work, place, turn_phase, warpgroup, thread);
        } else if (kBlocksA > 2 && blocks == 2) {
          tile<(kBlocksA > 2 ? 2 : 1)>(args, shared, epilogue, work, place, turn_phase, warpgroup, thread);
        } else {
          tile<1>(args, shared, epilogue, work, place, turn_phase, warpgroup, thread);
        }
      }
      __syncwarp();  // without it the compiler forgets which values are the same for the whole warp
    }
    if constexpr (kWgrad) epilogue.drain();
  }
};

template <class Spec>
__global__ void __launch_bounds__(GroupedKernel<Spec>::kThreads, 1) grouped_kernel(__grid_constant__ const Args args) {
  using K = GroupedKernel<Spec>;
  extern __shared__ __align__(1024) char base[];  // swizzled blocks begin at multiples of 1024 bytes
  // If the compiler knows that an address is the same for the whole warp, it keeps it out of the lanes' registers.
  const uint32_t start = uniform(cute::cast_smem_ptr_to_uint(base));
  const typename K::Shared shared(static_cast<char*>(__cvta_shared_to_generic(start)));
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int rank = K::kCluster == 1 ? 0 : cute::block_rank_in_cluster();

  const typename K::Schedule schedule(args.problem, shared.schedule);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < K::kStages; ++stage) {
      shared.full[stage].init(1 + K::kScaleLoaders);
      shared.empty[stage].init(K::kCluster * K::kReaders);
    }
    for (int warpgroup = 0; warpgroup < K::kConsumers; ++warpgroup) shared.turn[warpgroup].init(1);
    typename K::Queue(shared.queue, schedule, rank).init();
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if constexpr (K::kCluster > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  }

  if (warpgroup == K::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<K::kProducerRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    // The compiler knows that an elected thread is a single one, so it emits no loop over the threads that use TMA.
    if (warp == 0 && cute::elect_one_sync()) K::produce(args, shared, schedule, rank);
    if (K::kCounts && rank == 0 && warp == 1 && cute::elect_one_sync()) {
      typename K::Queue(shared.queue, schedule, rank).serve(args);
    }
    if constexpr (K::kScaled) {
      if (warp == 2) K::load_scales(args, shared, schedule, rank);
    } else if constexpr (K::kCounts) {
      if (args.gather.table != nullptr && warp >= 4 - kGatherers) {
        gather_rows<typename K::T>(args.gather, args.problem.num_rows, takes_last_first(args.l2_slices));
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<K::kConsumerRegisters>();
    K::consume(args, shared, schedule, rank, uniform(warpgroup));
  }
  // A block may end only when no other block of the cluster writes into its shared memory any more.
  __syncwarp();
  if constexpr (K::kCluster > 1) {
    cute::cluster_arrive();
    cute::cluster_wait();
  }
}

template <class Spec>
cudaError_t launch(Args const& args, int num_sms, cudaStream_t stream) {
  using K = GroupedKernel<Spec>;
  const int shared_bytes = K::shared_bytes(args.problem.num_experts);
  if (auto error = cudaFuncSetAttribute(grouped_kernel<Spec>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.blockDim = K::kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = K::kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  if (K::kCounts) {
    if (auto error = cudaMemsetAsync(args.counter, 0, args.counter_bytes, stream)) return error;
  }
  // All blocks run at once. The GPU may hold fewer clusters than its SMs suggest.
  int clusters = num_sms / K::kCluster;
  if constexpr (K::kCluster > 2) {
    config.gridDim = clusters * K::kCluster;
    if (auto error = cudaOccupancyMaxActiveClusters(&clusters, grouped_kernel<Spec>, &config)) return error;
  }
  config.gridDim = clusters * K::kCluster;
  return cudaLaunchKernelEx(&config, grouped_kernel<Spec>, args);
}

template <class Spec>
int max_experts() {
  using K = GroupedKernel<Spec>;
  static_assert(K::shared_bytes(1) <= kSharedMemory);
  return (kSharedMemory - K::shared_bytes(0)) / (K::shared_bytes(1) - K::shared_bytes(0));
}

}  // namespace latent_moe::sm90
