// In which order tiles are taken: each cluster the next that nobody has.
//
// Tiles differ in their rows, and clusters that took every n-th one would drift apart until the weights that neighbouring
// tiles share had left the L2 cache in between. One thread of a cluster counts in memory and tells its blocks. Clusters
// on one side of the L2 cache take tiles from the first on, those on the other from the last, so that nearly all tiles
// of an expert run on one side (sides.h).
#pragma once

#include "gather.cuh"

namespace latent_moe {

// With Cluster 0 nobody counts: block b takes tiles b, b + gridDim.x, ..., for kernels of few tiles.
template <int Cluster>
class Queue {
  static constexpr int kSlots = Cluster == 0 ? 0 : 4;
  static constexpr int kReaders = kConsumers * 4 + 1;  // warps of consumers, and the producer's thread

 public:
  static constexpr int kSharedBytes = kSlots * (2 * sizeof(uint64_t) + sizeof(int));

  __device__ explicit Queue(void* shared)
      : full_(static_cast<Barrier*>(shared)), empty_(full_ + kSlots), ids_(reinterpret_cast<int*>(empty_ + kSlots)) {}

  // By one thread, before the blocks of the cluster meet.
  __device__ void init() const {
    for (int slot = 0; slot < kSlots; ++slot) {
      full_[slot].init(1);
      empty_[slot].init(Cluster * kReaders);
    }
  }

  // By the thread that counts, in the first block of a cluster.
  __device__ void serve(uint64_t* counter, int count, bool last_first) {
    const unsigned long long one = last_first ? 1ull << 32 : 1;
    int id = 0;
    do {
      empty_[slot_].wait(phase_ ^ 1);
      const unsigned long long taken = atomicAdd(reinterpret_cast<unsigned long long*>(counter), one);
      const int from_first = static_cast<int>(taken), from_last = static_cast<int>(taken >> 32);
      id = from_first + from_last >= count ? count : last_first ? count - 1 - from_last : from_first;
      if constexpr (Cluster == 1) {
        *const_cast<int volatile*>(ids_ + slot_) = id;
        full_[slot_].arrive();
      } else {
        for (int block = 0; block < Cluster; ++block) {
          cute::store_shared_remote(id, cute::cast_smem_ptr_to_uint(ids_ + slot_),
                                    cute::cast_smem_ptr_to_uint(full_ + slot_), block);
        }
      }
      next();
    } while (id < count);
  }

  // The next tile; from the count of tiles on there is none. By each warp of the consumers and one more thread of each
  // block, of which the latter has Producer true.
  template <bool Producer>
  __device__ __forceinline__ int take() {
    if constexpr (kSlots == 0) {
      const int id = blockIdx.x + taken_ * gridDim.x;
      ++taken_;
      return id;
    } else {
      // One lane reads for its warp: its arrival orders its own read, and no other's, before the slot is used again.
      int id = 0;
      if (Producer || threadIdx.x % 32 == 0) {
        Barrier& full = full_[slot_];
        if (Producer && Cluster > 1) full.arrive_and_expect_tx(sizeof(int));
        full.wait(phase_);
        id = *reinterpret_cast<int volatile*>(ids_ + slot_);
        Cluster == 1 ? empty_[slot_].arrive() : empty_[slot_].arrive(0u);
      }
      if (!Producer) id = __shfl_sync(~0u, id, 0);
      next();
      return id;
    }
  }

 private:
  __device__ __forceinline__ void next() {
    if (++slot_ == kSlots) slot_ = 0, phase_ ^= 1;
  }

  Barrier* full_;
  Barrier* empty_;
  int* ids_;
  int slot_ = 0, taken_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace latent_moe
