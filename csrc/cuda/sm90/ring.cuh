// A ring of stages in shared memory, between producer warps and consumer warpgroups.
#pragma once

#include "cuda/ptx/bulk_copy.cuh"

namespace marlin::cuda::sm90 {

// The barriers of a ring: of stages that are full, then of those that are empty, 8 bytes each.
template <int kStages>
__device__ constexpr uint32_t empty_after(uint32_t full) {
  return full + 8 * kStages;
}

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

// A consumer's place in the ring, where `kStep` of them take turns at stages. It is counted in `kUnit`: in 8, as
// barriers lie, loops without zero points are up to 2% faster, in 1 others up to 1%: a kernel that has both counts in 8.
template <int kStages, int kStep, int kUnit = 8>
struct RingConsumer {
  uint32_t full;       // the first stage's barrier
  uint32_t place = 0;  // the stage's number, times kUnit
  uint32_t parity = 0;

  __device__ RingConsumer(uint32_t first_barrier, int stage)
      : full(first_barrier), place(stage * kUnit) {}

  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(full + offset<8>(), parity); }
  __device__ __forceinline__ void advance() {
    place += kUnit * kStep;
    if (place >= kUnit * kStages) place -= kUnit * kStages, parity ^= 1;
  }

  // Where the stage's part begins, counted from the first's, if each is of so many bytes.
  template <int kBytes>
  __device__ __forceinline__ uint32_t offset() const {
    static_assert(kBytes % kUnit == 0);
    return place * (kBytes / kUnit);
  }

  // The barrier at which it is given back. Every thread arrives: one arrival per warp would do, but
  // compute-sanitizer takes it for a race, and it is no faster.
  __device__ __forceinline__ uint32_t empty() const {
    return empty_after<kStages>(full) + offset<8>();
  }
};

}  // namespace marlin::cuda::sm90
