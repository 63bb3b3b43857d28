// The GEMM for more than a few tokens on Hopper: `wgmma` with the weights as register operand A,
// persistent blocks.
//
// A tile is up to kRowBlocks pieces of 64 output features by kTokens tokens, one piece per consumer
// warpgroup, which all multiply the same activations. Weights are scaled in registers, that is,
// rounded to the activations' type as `dequantize` rounds them. A producer warpgroup fills a ring of
// stages by bulk copies: weights as they lie, activations, scales and zero points; and, where weights
// are 2:4 sparse (S::kSparse), their metadata.
//
// Where tiles do not go round, the first of them are given out in equal runs of stages (plan::StageRun): the block
// with a tile's last stages adds the fp32 sums that the others have left in memory.
//
// Programmatic dependent launch as in decode.cuh, but that consumers wait for earlier kernels, too.
#pragma once

#include "cuda/sm90/prefill_consumer.cuh"
#include "cuda/sm90/prefill_producer.cuh"

namespace marlin::cuda::sm90 {

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kTile.threads(), 1)
    prefill_kernel(const __grid_constant__ PrefillParams<Element> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-ptx::shared_address(unaligned) & 1023);
  const uint32_t full = ptx::shared_address(shared + S::kBarriersAt);
  const uint32_t empty = empty_after<S::kStages>(full);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(full + 8 * i, PrefillProducer<Element, S>::kArrivals);
      ptx::mbarrier_init(empty + 8 * i, S::kConsumers);
    }
    ptx::mbarrier_init_fence();
  }
  if (p.static_weights) ptx::let_next_kernel_start();
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    ptx::give_registers<S::kProducerRegisters>();
    const int warp =
        __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 - S::kConsumers / 32, 0);
    PrefillProducer<Element, S>{p, ptx::shared_address(shared), {full, empty}}.run(warp);
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    ptx::wait_for_earlier_kernels();
    if (!p.static_weights) ptx::let_next_kernel_start();
    PrefillConsumer<Element, S>(p, shared, full).run();
  }
#endif
}

}  // namespace marlin::cuda::sm90
