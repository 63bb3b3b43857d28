#include "plan/decode.h"

#include <algorithm>
#include <array>

#include "plan/common.h"
#include "plan/prefill.h"

namespace marlin::plan {
namespace {

#define MARLIN_SM90_DECODE(tokens, row_tiles, splits, stage_blocks, blocks_per_sm, input_stages, \
                           most_n, most_weights, reason)                                         \
  DecodeKernel{0,                                                                                \
               DecodeTile{tokens, row_tiles, splits, stage_blocks, blocks_per_sm, input_stages}, \
               most_n, most_weights, reason},
#define MARLIN_SM90_DECODE_RUNS(tokens, row_tiles, splits, stage_blocks, input_stages, reason)    \
  DecodeKernel{0,                                                                                 \
               DecodeTile{tokens, row_tiles, splits, stage_blocks, 1, input_stages, false, true}, \
               0, 0, reason},

constexpr int64_t kAny = int64_t{1} << 62;

auto dense_table() {
  return std::to_array<DecodeKernel>({
#include "plan/decode_table.inc"
  });
}

auto sparse_table() {
  return std::to_array<DecodeKernel>({
#include "plan/decode_24_table.inc"
  });
}

#undef MARLIN_SM90_DECODE
#undef MARLIN_SM90_DECODE_RUNS

// Stages of weights that a block does.
int64_t stages_per_block(const DecodePlan& plan) {
  return ceil_div(int64_t{plan.row_tiles} * plan.token_tiles * plan.stages, plan.blocks);
}

// Copies are done in the order in which they are asked for, and those of the activations come last, so
// that they wait for all the weights that were asked for before the previous kernel had finished. Where a
// block does much, and few tokens leave little else to wait for, a few stages are better than a ring full:
// 18.8 us against 19.4 at 28672 x 4096, M = 1, 60.9 against 65.1 at 57344 x 8192. Where it does little,
// what is there early counts: 3.8 against 4.4 at 4096 x 4096. With 16 tokens a few are better in models, where other
// kernels run in between: 61.1 us a block of Llama-3-8B for 62.7, 103 of Qwen2.5-32B for 106; in a chain of
// products it is 5% less to 1% more. (H200, group 128, fp16; between 8 and 24 stages of 512 columns nothing was
// measured.)
int early_stages(const DecodePlan& plan) {
  constexpr int kFewTokens = 8, kMuch = 24, kEarly = 4, kMoreTokens = 16, kMoreEarly = 6;
  const DecodeTile& tile = plan.kernel.tile;
  const int ring = tile.stages(plan.period);
  if (tile.tokens <= kFewTokens) return stages_per_block(plan) > kMuch ? kEarly : ring;
  const bool some = tile.tokens == kMoreTokens && tile.blocks_per_sm == 1 && !tile.sparse;
  return some ? std::min(kMoreEarly, ring) : ring;
}

// Where two blocks fit a multiprocessor, a block starts when the kernel before the previous one ends, and
// the previous one then asks for its activations: weights that are asked for at once come before them,
// which small layers feel: 3.7 us against 4.0 at 4096 x 4096, M = 1; but 9.8 against 9.5 at 4096 x 14336,
// which has another kernel now.
int first_stages(const DecodePlan& plan) {
  constexpr int kMuch = 10;
  if (plan.kernel.tile.blocks_per_sm > 1 && stages_per_block(plan) <= kMuch) return 0;
  return std::min(plan.kernel.tile.most_first_stages(plan.period), plan.early_stages);
}

// A model of the time of a plan in microseconds, fitted to an H200, to compare plans of one problem. A launch
// takes 2 us to start; a tile takes something for its weights and something for every token, and one of 128 rows
// something at its end. 2:4 sparse weights are fewer bytes, but read activations twice as often, which tiles of
// 64 rows feel. To share tiles over memory takes 3 us, and more for more sums and more blocks to a tile: they,
// and then a flag, are written to L2, seen by another multiprocessor and read, one after the other.
struct Estimate {
  double us;
  // Less what of the start does not show in a chain of launches. Where some pairs have a tile less than others,
  // the next kernel's first pairs start there early; so it was where the others shared no tile. It decides
  // between decode kernels for many tokens only, since the model of the prefill kernels does not know it.
  double in_chain_us;
};

// To tiles shared over memory this is added where they are compared with pairs: taken where they gain for certain.
constexpr double kForCertain = 1.05;

// What a tile takes, to a dense one's time where there is one token tile: several find weights in L2, but 2:4
// ones read the more activations.
double pace(const DecodePlan& plan) {
  const DecodeTile& tile = plan.kernel.tile;
  const bool several = plan.token_tiles > 1;
  if (!tile.sparse) return several ? 0.96 : 1;
  if (tile.row_tiles == 2) return 0.7;
  if (!tile.many_tokens()) return 0.78;
  return !several ? 0.72 : tile.tokens == 80 ? 0.81 : 0.77;
}

Estimate estimate(const DecodePlan& plan) {
  constexpr double kStart = 2;
  const DecodeTile& tile = plan.kernel.tile;
  const double per_1024_columns =
      tile.row_tiles == 1 ? std::max(1.0, 0.2 + 0.0262 * tile.tokens) : 1.4 + 0.034 * tile.tokens;
  const double columns = static_cast<double>(plan.stages) * tile.stage_k();
  const double of_tile = columns / 1024 * per_1024_columns * pace(plan);
  const int64_t tiles = int64_t{plan.row_tiles} * plan.token_tiles,
                clusters = plan.blocks / plan.cluster;
  if (tile.runs) {
    const double most =
        static_cast<double>(ceil_div(tiles * plan.stages, plan.blocks)) / plan.stages;
    const double senders = std::max(1.0, 1 / most);
    const double sharing =
        plan.runs().share_tiles() ? 3 + tile.tokens * tile.rows() / 2048.0 * senders : 0;
    const double us = kStart + most * of_tile + sharing;
    return {us, kForCertain * us};
  }
  const int64_t of_pair = ceil_div(tiles, clusters);
  const double most = static_cast<double>(of_pair) / plan.cluster;
  const double mean = static_cast<double>(tiles) / plan.blocks;
  const bool hides = of_pair % plan.cluster == 0;
  const double ends = tile.row_tiles == 2 ? 0.9 * most : 0;
  const double us = kStart + most * of_tile + ends;
  return {us, us - (hides ? std::min(kStart, (most - mean) * of_tile) : 0)};
}

// The first kernel of the table for few tokens that suits.
std::optional<DecodePlan> select_for_few_tokens(const Problem& problem, bool runs) {
  for (const DecodeKernel& kernel : decode_kernels(problem.sparse)) {
    const bool suits_layer =
        runs || problem.n <= kernel.most_n || problem.n * problem.k <= kernel.most_weights;
    if (kernel.tile.runs != runs || kernel.tile.many_tokens() || !suits_layer) continue;
    if (kernel.tile.tokens >= problem.m) return decode_plan_with(kernel, 2, problem);
  }
  return std::nullopt;
}

// Whether a kernel for many tokens is worth a look. Several token tiles only of layers that are not wide: wide
// ones are bound by power, and slower than the model says (28672 x 4096, M = 384: 141 us, the prefill kernel
// 130; H200). Of dense weights at most three tiles of 144 tokens (8192 x 8192, M = 400: 80, the prefill kernel 88),
// of narrow layers four of 112 (elsewhere 94 and 86 at 8192 x 8192, M = 448).
bool suits(const DecodeKernel& kernel, const Problem& p) {
  constexpr int64_t kMost = 432, kMostSparse = 384, kMostNarrow = 448;
  constexpr int64_t kWide = 16384, kNarrow = 4096;
  const bool one_tile = p.m <= kernel.tile.tokens;
  const int64_t most = p.sparse ? kMostSparse : p.n <= kNarrow ? kMostNarrow : kMost;
  return kernel.tile.many_tokens() && p.m <= most && (one_tile || p.n <= kWide);
}

// With many tokens the kernel that the model takes for the fastest; nothing where that is a prefill kernel.
std::optional<DecodePlan> select_for_many_tokens(const Problem& problem) {
  std::optional<DecodePlan> best;
  double least = 0, least_alone = 0;  // us in a chain, and of any of them alone
  for (const DecodeKernel& kernel : decode_kernels(problem.sparse)) {
    if (!suits(kernel, problem)) continue;
    const DecodePlan plan = decode_plan_with(kernel, 2, problem);
    const Estimate time = estimate(plan);
    least_alone = best ? std::min(least_alone, time.us) : time.us;
    if (best && time.in_chain_us >= least) continue;
    least = time.in_chain_us;
    best = plan;
  }
  if (!best) return best;
  return estimated_us(*select_prefill(problem)) < least_alone ? std::nullopt : best;
}

}  // namespace

std::span<const DecodeKernel> decode_kernels(bool sparse) {
  static const auto dense = numbered(dense_table(), false);
  static const auto sparse_24 = numbered(sparse_table(), true);
  return sparse ? std::span<const DecodeKernel>(sparse_24) : dense;
}

std::string DecodeKernel::name() const {
  return (tile.sparse ? "sm90_decode_24_t" : "sm90_decode_t") + std::to_string(tile.tokens) + "_r" +
         std::to_string(tile.rows()) + "_k" + std::to_string(tile.stage_k()) + "_s" +
         std::to_string(tile.splits) + (tile.runs ? "_runs" : "");
}

DecodePlan decode_plan_with(const DecodeKernel& kernel, int cluster, const Problem& problem) {
  DecodePlan plan{};
  plan.kernel = kernel;
  plan.period = scale_period(problem);
  plan.row_blocks = static_cast<int>(ceil_div(problem.n, 64));
  plan.row_tiles = static_cast<int>(ceil_div(problem.n, kernel.tile.rows()));
  plan.token_tiles = static_cast<int>(ceil_div(problem.m, kernel.tile.tokens));
  plan.stages = static_cast<int>(ceil_div(problem.k, kernel.tile.stage_k()));
  plan.cluster = !kernel.tile.runs && problem.device.clusters_of(cluster) > 0 ? cluster : 1;
  // Every multiprocessor gets a block, even where there are fewer tiles: with room for two blocks on
  // each, the next kernel's blocks then find exactly one place on every multiprocessor.
  plan.blocks = problem.device.clusters_of(plan.cluster) * plan.cluster;
  plan.early_stages = early_stages(plan);
  plan.first_stages = first_stages(plan);
  return plan;
}

std::optional<DecodePlan> select_decode(const Problem& problem) {
  if (!problem.device.wgmma) return std::nullopt;
  const auto pairs = select_for_few_tokens(problem, false);
  if (!pairs) return select_for_many_tokens(problem);
  // Of the same rows only: where the table takes more of them, power is the bound, of which the model knows
  // nothing (57344 x 8192, M = 32: 84 us with runs of 64 rows, 79 with pairs of 128; H200).
  const auto runs = select_for_few_tokens(problem, true);
  const bool compare = runs && runs->kernel.tile.row_tiles == pairs->kernel.tile.row_tiles;
  return compare && kForCertain * estimate(*runs).us < estimate(*pairs).us ? runs : pairs;
}

}  // namespace marlin::plan
