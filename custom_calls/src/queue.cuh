// In which order tiles are taken: each cluster the next that nobody has.
//
// Tiles differ in their rows, and clusters that took every n-th one would drift apart until the weights that neighbouring
// tiles share had left the L2 cache in between. One thread of a cluster counts in memory, looks up what it has taken,
// sees that the rows are there where they are gathered, and tells its blocks: loads and products, which are short where
// few rows are contracted, wait for none of it. Clusters on one side of the L2 cache take tiles from the first on, those
// on the other from the last, so that nearly all tiles of an expert run on one side (sides.h).
#pragma once

#include "gather.cuh"

namespace latent_moe {

// With Counts false nobody counts: block b takes tiles b, b + gridDim.x, ..., for kernels of few tiles.
template <int I, bool Counts>
class Queue {
  static constexpr int kCluster = kInstances[I].tile.cluster_rows * kInstances[I].tile.cluster_columns;
  static constexpr int kSlots = Counts ? 4 : 0;
  static constexpr int kReaders = kConsumers * 4 + 1;  // warps of consumers, and the producer's thread

 public:
  static constexpr int kSharedBytes = kSlots * (sizeof(Work) + 2 * sizeof(uint64_t));

  __device__ Queue(char* shared, Schedule<I> const& schedule, int rank)
      : schedule_(schedule),
        works_(reinterpret_cast<Work*>(shared)),
        full_(reinterpret_cast<Barrier*>(works_ + kSlots)),
        empty_(full_ + kSlots),
        rank_(rank) {}

  // By one thread, before the blocks of the cluster meet.
  __device__ void init() const {
    for (int slot = 0; slot < kSlots; ++slot) {
      full_[slot].init(1);
      empty_[slot].init(kCluster * kReaders);
    }
  }

  // By the thread that counts, in the first block of a cluster.
  __device__ void serve(Args const& args) {
    const bool last_first = takes_last_first(args.sides);
    int expert = 0, id = next_id(args.counter, last_first);
    RowsReady rows_ready;
    bool more;
    do {
      more = id < schedule_.count();
      // The next is counted while this one is looked up.
      const int after = more ? next_id(args.counter, last_first) : id;
      Work const work = more ? schedule_.work(id, expert) : Work::none();
      id = after;
      if (args.gather.table != nullptr && work.steps > 0) {
        rows_ready.wait(args.gather, args.num_rows, work.row, work.valid);
      }
      empty_[slot_].wait(phase_ ^ 1);
      if constexpr (kCluster == 1) {
        works_[slot_] = work;
        full_[slot_].arrive();
      } else {
        for (int block = 0; block < kCluster; ++block) send(work, block);
      }
      next();
    } while (more);
  }

  // The next tile of this block, if there is one. By each warp of the consumers and one more thread of each block, of
  // which the latter has Producer true.
  template <bool Producer>
  __device__ __forceinline__ bool take(Work& work) {
    if constexpr (!Counts) {
      const int id = blockIdx.x + taken_ * gridDim.x;
      ++taken_;
      if (id >= schedule_.count()) return false;
      work = schedule_.work(id, expert_);
    } else {
      Barrier& full = full_[slot_];
      if (Producer && kCluster > 1) full.arrive_and_expect_tx(sizeof(Work));
      full.wait(phase_);
      work = read(works_ + slot_);
      // One lane tells that its warp has read. What was read must have come back, which no barrier waits for: a load may
      // stand long behind stores. No tile has a negative row, but to know that takes both loads.
      const bool came_back = (work.row | work.steps) >= 0;
      if ((Producer || threadIdx.x % 32 == 0) && came_back) {
        kCluster == 1 ? empty_[slot_].arrive() : empty_[slot_].arrive(0u);
      }
      next();
      if (work.expert < 0) return false;
    }
    Schedule<I>::of_block(work, rank_);
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
    const uint32_t to = cute::set_block_rank(cute::cast_smem_ptr_to_uint(works_ + slot_), block);
    const uint32_t barrier = cute::set_block_rank(cute::cast_smem_ptr_to_uint(full_ + slot_), block);
    const auto* words = reinterpret_cast<uint32_t const*>(&work);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                       to + i * 4),
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
    if (++slot_ == kSlots) slot_ = 0, phase_ ^= 1;
  }

  Schedule<I> const& schedule_;
  Work* works_;
  Barrier* full_;
  Barrier* empty_;
  int rank_, slot_ = 0, taken_ = 0, expert_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace latent_moe
