// A ring of stages in shared memory, between producer warps and consumer warpgroups.
#pragma once

#include "cuda/ptx/bulk_copy.cuh"

namespace marlin::cuda::sm90 {

// A producer's place in the ring. A stage is full when every producer has asked for its copies and
// they have arrived, and empty when its consumers have arrived.
template <int kStages>
struct RingProducer {
  uint32_t full, empty;      // the first stage's barriers; the others' follow
  int slot = 0, parity = 1;  // a new barrier's previous phase counts as complete

  // Waits for the next slot to be free and has one thread call copy(slot, barrier). The whole warp gets
  // here, so that the compiler keeps addresses in uniform registers, as copies want them.
  template <typename Copy>
  __device__ __forceinline__ void fill(Copy&& copy) {
    ptx::mbarrier_wait(empty + 8 * slot, parity);
    if (ptx::elect_one()) copy(slot, full + 8 * slot);
    __syncwarp();
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

// A consumer's place in the ring, where `kStep` of them take turns at stages.
template <int kStages, int kStep>
struct RingConsumer {
  uint32_t full, empty;
  int slot, parity = 0;

  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(full + 8 * slot, parity); }
  __device__ __forceinline__ void advance() {
    slot += kStep;
    if (slot >= kStages) slot -= kStages, parity ^= 1;
  }

  // Every thread arrives. One arrival per warp would do, but compute-sanitizer takes it for a race, and
  // it is no faster.
  __device__ __forceinline__ void release() const { ptx::mbarrier_arrive(empty + 8 * slot); }
  __device__ __forceinline__ void release_previous() const {
    ptx::mbarrier_arrive(empty + 8 * (slot < kStep ? slot + kStages - kStep : slot - kStep));
  }
};

}  // namespace marlin::cuda::sm90
