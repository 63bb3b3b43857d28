// The GEMM for few tokens on Hopper: `wgmma` with the weights as register operand A.
//
// It computes, for tiles of 64 * kRowTiles output features and up to kTokens tokens,
//     sums[row, token] = sum over groups of scale[row, group] * sum_k (q - zero)[row, k] x[token, k]
//
// or, where weights are 2:4 sparse (DecodeShape::kSparse), the sum over the columns that are stored: then
// an instruction takes 32 columns instead of 16, and their places, which come with the weights.
// With many tokens or short groups weights are scaled instead (S::kScalesWeights).
//
// Roles: three producer warps fill two rings by bulk copies, one of weights as they lie with their
// scales and zero points, one of activations; kRowTiles * kSplits consumer warpgroups convert and
// multiply, and take turns at stages: stage i belongs to split i % kSplits. They leave their sums in
// shared memory and go on with the next tile, while a finisher warp adds the splits in order and
// stores; those of the last tile, with runs also of one before a short rest, they add and store
// themselves, and all where there is no finisher (S::kHasFinisher). Where the tiles do not go round,
// pairs of blocks share one, and in some kernels half of another (plan::DecodeShare), or, in kernels
// for that, any blocks some (plan::StageRun).
//
// Programmatic dependent launch: with `static_weights` the producers fill the ring with weights while
// the previous kernel still runs; activations are read, and outputs written, only after it has
// finished: the warp that copies activations waits for that, and all others for its copies. Without
// it, nothing is read before the wait, and the next kernel is let go only after it, so that a promise
// made by the next call cannot reach past a kernel that this one waits for. Where two blocks fit a
// multiprocessor, the second is the next kernel's, with weights in its ring.
//
// Every cycle before the first copies makes the launch longer: what comes before them is kept short.
#pragma once

#include "cuda/sm90/decode_consumer.cuh"
#include "cuda/sm90/decode_finish.cuh"
#include "cuda/sm90/decode_producer.cuh"

namespace marlin::cuda::sm90 {

// Stores the tiles that the consumers do not.
template <typename Element, typename S>
__device__ void finish_tiles(const DecodeParams<Element>& p, uint32_t base,
                             const DecodeBarriers<S>& barriers) {
  const DecodeFinish<Element, S> finish{p, base};
  DecodeCursor<Element, S> work(p);
  int parity = 0;
#pragma unroll 1
  for (; work.valid() && !work.last(); work.advance()) {
    const bool stored = work.consumers_store();
#pragma unroll 1
    for (int pass = 0; pass < S::kPasses; ++pass) {
      ptx::mbarrier_wait(barriers.sums_full(), parity);
      if (!stored) finish.template run<32>(work, pass, static_cast<int>(threadIdx.x) % 32);
      ptx::mbarrier_arrive(barriers.sums_free());
      parity ^= 1;
    }
  }
  if constexpr (S::kRuns) {
    if (work.valid() && work.gathers() && ptx::elect_one()) finish.await_partials(work);
  }
}

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams<Element> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const DecodeBarriers<S> barriers{base + S::kBarriersAt};
  const DecodeProducer<Element, S> producer{p, base, barriers};
  constexpr int kConsumerWarps = S::kConsumers / 32, kOtherWarps = S::kThreads / 32 - 1;
  const int helper =
      __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 - kConsumerWarps, 0);
  // One warp asks for weights; meanwhile the others make the rest ready, and wait for it no longer than
  // for its barriers.
  constexpr int kFirstReady = 1, kOthersReady = 2;
  if (helper == 0) {
    barriers.init_first();
    __syncwarp();
    ptx::barrier_arrive<kFirstReady, S::kThreads>();
    if (ptx::elect_one()) producer.start_weights();
    __syncwarp();
    ptx::barrier_sync<kOthersReady, S::kThreads>();
  } else {
    barriers.init_others(helper < 0 ? helper + kConsumerWarps : helper + kConsumerWarps - 1,
                         kOtherWarps);
    __syncwarp();
    if (p.static_weights) ptx::let_next_kernel_start();
    ptx::barrier_arrive<kOthersReady, S::kThreads>();
    ptx::barrier_sync<kFirstReady, S::kThreads>();
  }
  const bool pairs = !S::kRuns && p.deal.cluster > 1;
  if (pairs) {
    if (threadIdx.x == S::kThreads - 1) DecodeFinish<Element, S>{p, base}.expect();
    __syncwarp();
    ptx::cluster_arrive();  // this block's barriers are ready for what the other one sends
  }
  if (threadIdx.x >= S::kConsumers) {
    ptx::give_registers<S::kHelperRegisters>();
    // By a shuffle, so that the compiler keeps it.
    const uint32_t kept = S::kKeepsBase ? __shfl_sync(0xffffffffu, base, 0) : base;
    const DecodeProducer<Element, S> copies{p, kept, {kept + S::kBarriersAt}};
    if (helper == 0) copies.copy_weights();
    if (helper == 1) copies.copy_input();
    if (helper == 2) copies.copy_scales();
    if (pairs) ptx::cluster_wait();
    if constexpr (S::kHasFinisher) {
      if (helper == 3) finish_tiles<Element, S>(p, base, barriers);
    }
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    if (pairs) ptx::cluster_wait();
    DecodeConsumer<Element, S>{p, DecodePlace<S>(base)}.run();
  }
#endif
}

}  // namespace marlin::cuda::sm90
