#include "cuda/sm90/launch.cuh"

#include "cuda/sm90/decode.cuh"
#include "cuda/sm90/decode_instances.h"
#include "cuda/sm90/tensor_map.h"

namespace marlin::cuda::sm90 {
namespace {

template <typename Element>
constexpr MapType kMapType =
    std::is_same_v<Element, __half> ? MapType::kFloat16 : MapType::kBFloat16;

template <typename Element>
DecodeParams<Element> params_of(const Gemm& args, const plan::DecodePlan& plan,
                                const Operands<Element>& operands) {
  const auto m = static_cast<uint64_t>(args.m), n = static_cast<uint64_t>(args.n);
  const auto groups = static_cast<uint64_t>(operands.groups);
  const auto columns = static_cast<uint64_t>(operands.columns);
  const auto scale_stride = static_cast<uint64_t>(operands.scale_stride);
  const auto input_stride = static_cast<uint64_t>(operands.input_stride);
  const plan::DecodeTile& tile = plan.kernel.tile;
  const auto tokens = static_cast<uint32_t>(tile.tokens), rows = static_cast<uint32_t>(tile.rows());
  const auto stage_blocks = static_cast<uint32_t>(tile.stage_blocks);
  const uint32_t box_groups = groups == 1 ? 1 : static_cast<uint32_t>(tile.stage_k() / plan.period);
  DecodeParams<Element> p{};
  p.input = tensor_map(kMapType<Element>, operands.input, {{64, m, columns / 64}},
                       {{input_stride * 2, 128}}, {{64, tokens, stage_blocks}}, true);
  p.scales = tensor_map(kMapType<Element>, operands.scales, {{n, groups}}, {{scale_stride * 2}},
                        {{rows, box_groups}}, false);
  if (operands.zeros) {
    p.zeros = tensor_map(MapType::kUint8, operands.zeros, {{n, groups}}, {{scale_stride}},
                         {{rows, box_groups}}, false);
  }
  p.qweight = args.qweight;
  p.bias = static_cast<const Element*>(args.bias);
  p.output = static_cast<Element*>(args.output);
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(args.n);
  p.n_blocks = static_cast<int>(layout::ceil_div(args.n, layout::kBlock));
  p.k_blocks = static_cast<int>(layout::ceil_div(args.k, layout::kBlock));
  p.row_tiles = plan.row_tiles;
  p.stages_per_block = plan.stages_per_block;
  p.cluster = plan.cluster;
  p.has_zeros = operands.zeros != nullptr;
  p.one_group = groups == 1;
  // Copies of the scales that this call has queued are work of an earlier kernel.
  p.static_weights = args.static_weights && operands.scales == args.scales;
  return p;
}

}  // namespace

template <typename Element>
void launch(const Gemm& args, const plan::DecodePlan& plan, void* workspace, cudaStream_t stream) {
  const auto operands = prepare<Element>(args, scratch_of(args, plan), workspace, stream);
  const auto params = params_of(args, plan, operands);
  const auto kernel = decode_instance<Element>(plan.kernel.id, plan.period);
  const int shared = plan.kernel.tile.shared_bytes(plan.period);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.kernel.tile.threads()));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = plan.cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, params), "decode_kernel");
}

template void launch<__half>(const Gemm&, const plan::DecodePlan&, void*, cudaStream_t);
template void launch<__nv_bfloat16>(const Gemm&, const plan::DecodePlan&, void*, cudaStream_t);

}  // namespace marlin::cuda::sm90
