#include "cuda/sm80/launch.cuh"

#include <algorithm>
#include <bit>

#include "cuda/element.cuh"
#include "cuda/sm80/instances.h"
#include "cuda/sm80/reduce.cuh"

namespace marlin::cuda::sm80 {
namespace {

template <typename Element>
Params<Element> params_of(const Gemm& args, const plan::Plan& plan,
                          const Operands<Element>& operands) {
  Params<Element> p{};
  p.input = operands.input;
  p.input_stride = operands.input_stride;
  p.qweight = args.qweight;
  p.meta = args.meta;
  p.scales = operands.scales;
  p.zeros = operands.zeros;
  p.scale_stride = static_cast<int>(operands.scale_stride);
  p.bias = static_cast<const Element*>(args.bias);
  p.output = static_cast<Element*>(args.output);
  p.partials = operands.partials;
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(args.n);
  p.k = static_cast<int>(operands.columns);
  p.n_blocks = static_cast<int>(layout::ceil_div(args.n, layout::kBlock));
  p.k_blocks = static_cast<int>(layout::ceil_div(args.k, plan.kernel.tile.block_k()));
  p.groups = static_cast<int>(operands.groups);
  p.group_shift = p.groups == 1 ? 31 : std::countr_zero(static_cast<uint64_t>(args.group_size));
  p.scale_shift = std::min(p.group_shift, std::countr_zero(unsigned(plan.kernel.tile.warp_k())));
  p.partition = plan.partition;
  return p;
}

}  // namespace

template <typename Element>
void launch(const Gemm& args, const plan::Plan& plan, void* workspace, cudaStream_t stream) {
  const auto operands = prepare<Element>(args, scratch_of(args, plan), workspace, stream);
  const auto params = params_of(args, plan, operands);
  const auto& tile = plan.kernel.tile;
  const auto& instance = instances<Element>(tile.sparse)[plan.kernel.id];
  // Set at every launch: it is cheap, it is per device, and a cache of it would be state to keep.
  check(cudaFuncSetAttribute(instance.gemm, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             tile.shared_bytes()),
        "cudaFuncSetAttribute");
  instance.gemm<<<static_cast<unsigned>(plan.partition.blocks), tile.threads(), tile.shared_bytes(),
                  stream>>>(params);
  check(cudaGetLastError(), "gemm_kernel");
  if (!plan.partition.splits_tiles()) return;
  const int64_t tokens = std::min<int64_t>(args.m, tile.tokens);
  const dim3 grid(static_cast<unsigned>(plan.partition.tiles()),
                  static_cast<unsigned>(layout::ceil_div(tokens, kReduceTokens)));
  instance.reduce<<<grid, dim3(tile.rows(), kReduceTokens), 0, stream>>>(params);
  check(cudaGetLastError(), "reduce_kernel");
}

template void launch<__half>(const Gemm&, const plan::Plan&, void*, cudaStream_t);
template void launch<__nv_bfloat16>(const Gemm&, const plan::Plan&, void*, cudaStream_t);

}  // namespace marlin::cuda::sm80
