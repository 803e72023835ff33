// The queue of tiles: each cluster takes the next one.
//
// Tiles differ in their rows. If each cluster took every n-th tile, clusters would drift apart, and the weights that
// neighbouring tiles share would leave the L2 cache in between. One thread of a cluster takes the next number from a counter
// in memory, looks up its tile, waits for its rows if they are gathered, and tells the blocks of the cluster. It runs some
// tiles ahead, so that loads and products do not wait for it, even if they are short because few rows are contracted.
// Clusters near one L2 slice take tiles from the start, those near the other slice from the end, so that nearly all tiles
// of an expert run near one slice (l2_slices.h).
#pragma once

#include "common/gather.cuh"
#include "common/schedule.cuh"
#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cutlass/arch/barrier.h"

namespace latent_moe {

// `Readers` threads of each block take tiles: a lane of each warp that multiplies, and one of each that loads. If Counts is
// false, there is no counter: block b takes the tiles b, b + gridDim.x, ..., which suits kernels of few tiles.
template <class Schedule, int Cluster, int Readers, bool Counts>
class Queue {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  static constexpr int kEntries = Counts ? 4 : 0;

 public:
  static constexpr int kSharedBytes = kEntries * (sizeof(Work) + 2 * sizeof(uint64_t));

  __device__ Queue(char* shared, Schedule const& schedule, int rank)
      : schedule_(schedule),
        works_(reinterpret_cast<Work*>(shared)),
        full_(reinterpret_cast<Barrier*>(works_ + kEntries)),
        empty_(full_ + kEntries),
        rank_(rank) {}

  // One thread of each block calls it, before the blocks of the cluster meet.
  __device__ void init() const {
    for (int entry = 0; entry < kEntries; ++entry) {
      full_[entry].init(1);
      empty_[entry].init(Cluster * Readers);
    }
  }

  // The counting thread calls it, in the first block of a cluster. Args has counter, problem.num_rows, gather and
  // l2_slices. (Passing these one by one made nvcc 13.0 allocate the registers of whole kernels differently.)
  template <class Args>
  __device__ void serve(Args const& args) {
    const bool last_first = takes_last_first(args.l2_slices);
    int expert = 0, id = next_id(args.counter, last_first);
    RowsReady rows_ready;
    bool more;
    do {
      more = id < schedule_.count();
      // The next number is on its way while this tile is looked up.
      const int after = more ? next_id(args.counter, last_first) : id;
      Work const work = more ? schedule_.work(id, expert) : Work::none();
      id = after;
      if (args.gather.table != nullptr && work.steps > 0) {
        rows_ready.wait(args.gather, args.problem.num_rows, work.row, work.valid);
      }
      empty_[entry_].wait(phase_ ^ 1);
      if constexpr (Cluster == 1) {
        works_[entry_] = work;
        full_[entry_].arrive();
      } else {
        for (int block = 0; block < Cluster; ++block) send(work, block);
      }
      next();
    } while (more);
  }

  // The next tile of this block, if there is one. Each warp that multiplies calls it, and each that loads. One of these is a
  // single thread, the producer's, which has Producer true.
  template <bool Producer>
  __device__ __forceinline__ bool take(Work& work) {
    if constexpr (!Counts) {
      const int id = blockIdx.x + taken_ * gridDim.x;
      ++taken_;
      if (id >= schedule_.count()) return false;
      work = schedule_.work(id, expert_);
    } else {
      Barrier& full = full_[entry_];
      if (Producer && Cluster > 1) full.arrive_and_expect_tx(sizeof(Work));
      full.wait(phase_);
      work = read(works_ + entry_);
      // One lane reports that its warp has read. The values must have arrived by then, and no barrier waits for that: a load
      // may queue behind stores for long. The condition is always true, but needs both loads to be known.
      const bool came_back = (work.row | work.steps) >= 0;
      if ((Producer || threadIdx.x % 32 == 0) && came_back) {
        Cluster == 1 ? empty_[entry_].arrive() : empty_[entry_].arrive(0u);
      }
      next();
      if (work.expert < 0) return false;
    }
    Schedule::of_block(work, rank_);
    return true;
  }

 private:
  __device__ int next_id(uint64_t* counter, bool last_first) const {
    const unsigned long long one = last_first ? 1ull << 32 : 1;
    const unsigned long long taken = atomicAdd(reinterpret_cast<unsigned long long*>(counter), one);
    const int from_first = static_cast<int>(taken), from_last = static_cast<int>(taken >> 32), count = schedule_.count();
    return from_first + from_last >= count ? count : last_first ? count - 1 - from_last : from_first;
  }

  // To another block of the cluster, whose barrier counts the bytes.
  __device__ void send(Work const& work, int block) const {
    const uint32_t to = cute::set_block_rank(cute::cast_smem_ptr_to_uint(works_ + entry_), block);
    const uint32_t barrier = cute::set_block_rank(cute::cast_smem_ptr_to_uint(full_ + entry_), block);
    const auto* words = reinterpret_cast<uint32_t const*>(&work);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to + i * 4),
          "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]), "r"(barrier)
          : "memory");
    }
  }

  static __device__ __forceinline__ Work read(Work const* from) {
    Work work;
    auto* words = reinterpret_cast<uint32_t*>(&work);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                   : "r"(cute::cast_smem_ptr_to_uint(from) + i * 4)
                   : "memory");
    }
    return work;
  }

  __device__ __forceinline__ void next() {
    if (++entry_ == kEntries) entry_ = 0, phase_ ^= 1;
  }

  Schedule const& schedule_;
  Work* works_;
  Barrier* full_;
  Barrier* empty_;
  int rank_, entry_ = 0, taken_ = 0, expert_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace latent_moe
