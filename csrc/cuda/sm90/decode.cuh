// The GEMM for few tokens on Hopper: `wgmma` with the weights as register operand A.
//
// It computes, for tiles of 64 * kRowTiles output features and up to kTokens tokens,
//     sums[row, token] = sum over groups of scale[row, group] * sum_k (q - zero)[row, k] x[token, k]
//
// Roles: three producer warps fill two rings by bulk copies, one of weights as they lie with their
// scales and zero points, one of activations; kRowTiles * kSplits consumer warpgroups convert and multiply, and take
// turns at stages: stage i belongs to split i % kSplits. They leave their sums in shared memory and go
// on with the next tile, while a finisher warp adds the splits in order and stores. Pairs of blocks
// share a tile where the tiles do not go round (plan::DecodeShare).
//
// Programmatic dependent launch: with `static_weights` the producers fill the ring with weights while
// the previous kernel still runs; activations are read, and outputs written, only after it has
// finished. Without it, nothing is read before the wait, and the next kernel is let go only after it,
// so that a promise made by the next call cannot reach past a kernel that this one waits for. Where two
// blocks fit a multiprocessor, the second is the next kernel's, with its ring full.
#pragma once

#include "cuda/sm90/decode_consumer.cuh"
#include "cuda/sm90/decode_finish.cuh"
#include "cuda/sm90/decode_producer.cuh"

namespace marlin::cuda::sm90 {

// Stores the tiles that are not the block's last.
template <typename Element, typename S>
__device__ void finish_tiles(const DecodeParams<Element>& p, uint32_t base,
                             const DecodeBarriers<S>& barriers) {
  int parity = 0;
#pragma unroll 1
  for (DecodeCursor<Element, S> work(p); work.valid() && !work.last(); work.advance()) {
    ptx::mbarrier_wait(barriers.sums_full(), parity);
    DecodeFinish<Element, S>{p, base}.template run<32>(work, static_cast<int>(threadIdx.x) % 32);
    ptx::mbarrier_arrive(barriers.sums_free());
    parity ^= 1;
  }
}

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams<Element> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const DecodeBarriers<S> barriers{base + S::kBarriersAt};
  if (threadIdx.x == S::kConsumers) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(barriers.full() + 8 * i, 2);  // weights and scales
      ptx::mbarrier_init(barriers.empty() + 8 * i, 128 * S::kRowTiles);
    }
    for (int i = 0; i < S::kInputStages; ++i) {
      ptx::mbarrier_init(barriers.input_full() + 8 * i, 1);
      ptx::mbarrier_init(barriers.input_empty() + 8 * i, 128 * S::kRowTiles);
    }
    ptx::mbarrier_init(barriers.sums_full(), S::kConsumers);
    ptx::mbarrier_init(barriers.sums_free(), 32);
    ptx::mbarrier_init(barriers.received(), 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect(barriers.received(), DecodeFinish<Element, S>::received_bytes(p.m));
  }
  if (p.static_weights) ptx::let_next_kernel_start();
  __syncthreads();
  const bool pairs = p.cluster > 1;
  if (pairs) ptx::cluster_arrive();  // this block's barriers are ready for what the other one sends
  if (threadIdx.x >= S::kConsumers) {
    ptx::give_registers<S::kHelperRegisters>();
    const int warp =
        __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 - S::kConsumers / 32, 0);
    const DecodeProducer<Element, S> producer{p, base, barriers};
    if (warp == 0) producer.copy_weights();
    if (warp == 1) producer.copy_input();
    if (warp == 2) producer.copy_scales();
    if (pairs) ptx::cluster_wait();
    if (warp == 3) {
      ptx::wait_for_earlier_kernels();
      finish_tiles<Element, S>(p, base, barriers);
    }
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    ptx::wait_for_earlier_kernels();
    if (!p.static_weights) ptx::let_next_kernel_start();
    if (pairs) ptx::cluster_wait();
    DecodeConsumer<Element, S>{p, DecodePlace<S>(base)}.run();
  }
#endif
}

}  // namespace marlin::cuda::sm90
