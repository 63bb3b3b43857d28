// How a block tells another that it has left sums for it in memory (plan::StageRun).
#pragma once

#include "cuda/ptx/bulk_copy.cuh"

namespace marlin::cuda::sm90 {

// Sums lie in the call's scratch, each with a flag that says that they are there: a number which memory that holds
// anything else does not hold by chance, so that scratch need not be cleared. Whoever has seen a flag clears
// it. By one thread, after a barrier of those that wrote the sums, or before one of those that read them.
constexpr uint64_t kSumsThere = 0x6d61726c696e2b34;

__device__ __forceinline__ void flag_sums(uint64_t* flag) { ptx::store_release(flag, kSumsThere); }
__device__ __forceinline__ void await_sums(uint64_t* flag) {
  while (ptx::load_acquire(flag) != kSumsThere) {
  }
  *flag = 0;
}

}  // namespace marlin::cuda::sm90
