// One multiplication of 64 rows on Hopper, the same for every kernel: 16 columns of dense weights or 32
// of 2:4 sparse ones, that is, a word of every thread.
#pragma once

#include "cuda/ptx/wgmma.cuh"

namespace marlin::cuda::sm90 {

template <bool kSparse>
inline constexpr int kStepColumns = kSparse ? 32 : 16;

// The activations of a step of a stage: those of 64 columns lie in 128 bytes of a token, those of the
// next 64 behind those of `tokens`, all that lie there.
template <bool kSparse>
__device__ __forceinline__ uint64_t input_of_step(uint64_t stage, int step, int tokens) {
  constexpr int kSteps = 64 / kStepColumns<kSparse>;
  return stage + static_cast<uint32_t>(step / kSteps * tokens * 8) +
         static_cast<uint32_t>(step % kSteps * kStepColumns<kSparse> / 8);
}

// A thread's metadata of a block. A multiplication reads it while it runs, not when it is issued, and
// ptxas does not know: its registers may be written only when those multiplications have been waited for
// that use what they held. (Otherwise sums were wrong now and then, on an H200.)
__device__ __forceinline__ uint2 load_meta(uint32_t address) {
  uint2 meta;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(meta.x), "=r"(meta.y)
               : "r"(address)
               : "memory");
  return meta;
}

// Step `step` of a block of 4, with activations at descriptor `b`. `meta` is the thread's of the block,
// where weights are sparse; see layout::quad_position_of.
template <typename Element, int kTokens, bool kSparse>
__device__ __forceinline__ void multiply_step(float (&to)[kTokens / 2], const uint32_t (&a)[4],
                                              const uint2& meta, uint64_t b, int step,
                                              bool accumulate) {
  if constexpr (!kSparse) {
    ptx::wgmma_m64k16<Element, kTokens>(to, a, b, accumulate);
  } else if (step < 2) {
    ptx::wgmma_sparse_m64k32<Element, kTokens, 0>(to, a, (&meta.x)[step % 2], b, accumulate);
  } else {
    ptx::wgmma_sparse_m64k32<Element, kTokens, 1>(to, a, (&meta.x)[step % 2], b, accumulate);
  }
}

}  // namespace marlin::cuda::sm90
