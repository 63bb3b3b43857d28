#include "cuda/sm90/launch.cuh"

#include <algorithm>
#include <array>
#include <bit>

#include "cuda/sm90/decode.cuh"
#include "cuda/sm90/decode_instances.h"
#include "cuda/sm90/prefill.cuh"
#include "cuda/sm90/prefill_instances.h"
#include "cuda/sm90/tensor_map.h"

namespace marlin::cuda::sm90 {
namespace {

template <typename Element>
constexpr MapType kMapType =
    std::is_same_v<Element, __half> ? MapType::kFloat16 : MapType::kBFloat16;

// What one copy of activations brings. Never many tokens that do not exist, which a tensor copy would fill
// with zeros: that is slow. (8192 x 8192 on an H200 with tiles of 128 tokens, of which the second had 64:
// 94 us; with both full, 61.)
struct InputBox {
  int tokens, blocks;  // of 64 columns
};

// Tokens in whole swizzle patterns of 8: a tile's, or fewer where there are not as many.
int whole_patterns(int tile_tokens, int64_t m) {
  return static_cast<int>(std::min<int64_t>(tile_tokens, (m + 7) / 8 * 8));
}

int input_tokens(const plan::DecodeTile& tile, int64_t m) {
  if (!tile.input_tokens_vary()) return tile.tokens;
  return tile.tokens < 8 ? static_cast<int>(m) : whole_patterns(tile.tokens, m);
}

// What kernels are told of a call whose tiles have `rows` and whose stages are of `stage_k` columns,
// with scales every `period` of them.
template <typename Element>
void describe(LayerParams<Element>& p, const Gemm& args, const Operands<Element>& operands,
              InputBox box, int rows, int stage_k, int period) {
  const auto m = static_cast<uint64_t>(args.m), n = static_cast<uint64_t>(args.n);
  const auto groups = static_cast<uint64_t>(operands.groups);
  const auto columns = static_cast<uint64_t>(operands.columns);
  const auto scale_stride = static_cast<uint64_t>(operands.scale_stride);
  const auto input_stride = static_cast<uint64_t>(operands.input_stride);
  const int stage_groups = groups == 1 ? 1 : std::max(stage_k / period, 1);
  const std::array<uint32_t, 2> scale_box{static_cast<uint32_t>(rows),
                                          static_cast<uint32_t>(stage_groups)};
  p.input = tensor_map(
      kMapType<Element>, operands.input, {{64, m, columns / 64}}, {{input_stride * 2, 128}},
      {{64, static_cast<uint32_t>(box.tokens), static_cast<uint32_t>(box.blocks)}}, true);
  p.scales = tensor_map(kMapType<Element>, operands.scales, {{n, groups}}, {{scale_stride * 2}},
                        scale_box, false);
  if (operands.zeros) {
    p.zeros = tensor_map(MapType::kUint8, operands.zeros, {{n, groups}}, {{scale_stride}},
                         scale_box, false);
  }
  p.input_tokens = box.tokens;
  p.qweight = args.qweight;
  p.meta = args.meta;
  p.bias = static_cast<const Element*>(args.bias);
  p.output = static_cast<Element*>(args.output);
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(args.n);
  p.n_blocks = static_cast<int>(layout::ceil_div(args.n, layout::kBlock));
  p.k_blocks = static_cast<int>(
      layout::ceil_div(args.k, args.meta ? layout::kSparseColumns : layout::kBlock));
  p.has_zeros = operands.zeros != nullptr;
  p.one_group = groups == 1;
  // Copies of the scales that this call has queued are work of an earlier kernel.
  p.static_weights = args.static_weights && operands.scales == args.scales;
}

// For what blocks leave each other: their sums, and then flags (partials.cuh).
template <typename Params, typename Plan>
void lend_scratch(Params& p, float* scratch, const Plan& plan) {
  p.partials = scratch;
  p.partial_flags = reinterpret_cast<uint64_t*>(scratch + int64_t{plan.blocks} *
                                                              plan.kernel.tile.partial_floats());
}

template <typename Params>
void start(void (*kernel)(Params), const Params& params, int blocks, int threads, int shared_bytes,
           int cluster, cudaStream_t stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, params), "cudaLaunchKernelEx");
}

}  // namespace

// Of blocks that fill a multiprocessor: those of one kernel stand for all. (A cluster lies within one GPC,
// whose multiprocessors it need not divide.) Where two of a kernel's blocks fit, the second place is kept for
// the next kernel's.
int pairs_at_once() {
  constexpr int kPeriod = 128;
  const auto kernels = plan::decode_kernels();
  const plan::DecodeKernel& kernel =
      *std::ranges::find_if(kernels, [](const auto& each) { return each.tile.blocks_per_sm == 1; });
  const auto function = decode_instance<__half>(kernel.id, false, kPeriod);
  const int shared_bytes = kernel.tile.shared_bytes(kPeriod);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(static_cast<unsigned>(kernel.tile.threads()));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int pairs = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&pairs, function, &config);
  if (error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();  // so that the next launch is not blamed for it
  } else {
    check(error, "cudaOccupancyMaxActiveClusters");
  }
  return pairs > 0 ? pairs : -1;
}

template <typename Element>
void launch(const Gemm& args, const plan::DecodePlan& plan, void* workspace, cudaStream_t stream) {
  const auto operands = prepare<Element>(args, scratch_of(args, plan), workspace, stream);
  const plan::DecodeTile& tile = plan.kernel.tile;
  DecodeParams<Element> p{};
  const InputBox box{input_tokens(tile, args.m), tile.stage_k() / 64};
  describe(p, args, operands, box, tile.rows(), tile.stage_k(), plan.period);
  p.row_tiles = plan.row_tiles;
  p.token_tiles = plan.token_tiles;
  p.deal = plan.deal();
  p.stages = plan.stages;
  p.runs = plan.runs();
  lend_scratch(p, operands.partials, plan);
  p.early_stages = plan.early_stages;
  p.first_stages = plan.first_stages;
  start(decode_instance<Element>(plan.kernel.id, tile.sparse, plan.period), p, plan.blocks,
        tile.threads(), tile.shared_bytes(plan.period), plan.cluster, stream);
}

template <typename Element>
void launch(const Gemm& args, const plan::PrefillPlan& plan, void* workspace, cudaStream_t stream) {
  const auto operands = prepare<Element>(args, scratch_of(args, plan), workspace, stream);
  const plan::PrefillTile& tile = plan.kernel.tile;
  PrefillParams<Element> p{};
  p.period_log2 = std::countr_zero(static_cast<unsigned>(plan.period));
  const InputBox box{whole_patterns(tile.tokens, args.m), tile.stage_k() / 64};
  describe(p, args, operands, box, tile.rows(), tile.stage_k(), plan.period);
  p.groups_per_block = plan.period == 64 && !p.one_group ? 1 : 0;
  p.row_tiles = plan.row_tiles;
  p.token_tiles = plan.token_tiles;
  p.token_group = plan.token_group;
  p.stages = plan.stages;
  p.stage_runs = plan.stage_runs();
  p.shared_tiles = plan.shared_tiles;
  lend_scratch(p, operands.partials, plan);
  p.copies_output = args.n % 8 == 0;
  if (p.copies_output) {
    const auto m = static_cast<uint64_t>(args.m), n = static_cast<uint64_t>(args.n);
    p.output_map = tensor_map(kMapType<Element>, args.output, {{n, m}}, {{n * 2}},
                              {{64, static_cast<uint32_t>(tile.tokens)}}, true);
  }
  start(prefill_instance<Element>(plan.kernel.id, tile.sparse, plan.period), p, plan.blocks,
        tile.threads(), tile.shared_bytes(), 1, stream);
}

template void launch<__half>(const Gemm&, const plan::DecodePlan&, void*, cudaStream_t);
template void launch<__nv_bfloat16>(const Gemm&, const plan::DecodePlan&, void*, cudaStream_t);
template void launch<__half>(const Gemm&, const plan::PrefillPlan&, void*, cudaStream_t);
template void launch<__nv_bfloat16>(const Gemm&, const plan::PrefillPlan&, void*, cudaStream_t);

}  // namespace marlin::cuda::sm90
