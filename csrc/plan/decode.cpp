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

// Models of the time of a plan in microseconds, fitted to an H200, to compare plans of one problem. To share tiles
// over memory takes 3 us, and more for more sums and more blocks to a tile: they, and then a flag, are written to L2,
// seen by another multiprocessor and read, one after the other.
double us_of_runs(const DecodePlan& plan, double of_tile) {
  constexpr double kStart = 2;
  const DecodeTile& tile = plan.kernel.tile;
  const int64_t tiles = int64_t{plan.row_tiles} * plan.token_tiles;
  const double most = static_cast<double>(ceil_div(tiles * plan.stages, plan.blocks)) / plan.stages;
  const double senders = std::max(1.0, 1 / most);
  const double sharing =
      plan.runs().share_tiles() ? 3 + tile.tokens * tile.rows() / 2048.0 * senders : 0;
  return kStart + most * of_tile + sharing;
}

// To tiles shared over memory this is added where they are compared with pairs: taken where they gain for certain.
constexpr double kForCertain = 1.05;

double columns_of_tile(const DecodePlan& plan) {  // in 1024
  return static_cast<double>(plan.stages) * plan.kernel.tile.stage_k() / 1024;
}

// Up to 32 tokens: a tile takes something for its weights and something for every token, and one of 128 rows
// something at its end. 2:4 sparse weights are fewer bytes, but read activations twice as often, which tiles of
// 64 rows feel.
double us_of_few_tokens(const DecodePlan& plan) {
  constexpr double kStart = 2;
  const DecodeTile& tile = plan.kernel.tile;
  const bool tall = tile.row_tiles == 2;
  const double pace = !tile.sparse ? 1 : tall ? 0.7 : 0.78;
  const double of_tile =
      columns_of_tile(plan) * pace *
      (tall ? 1.4 + 0.034 * tile.tokens : std::max(1.0, 0.2 + 0.0262 * tile.tokens));
  if (tile.runs) return us_of_runs(plan, of_tile);
  const int64_t of_pair = ceil_div(plan.row_tiles, plan.blocks / plan.cluster);
  const double most = static_cast<double>(of_pair) / plan.cluster;
  return kStart + most * (of_tile + (tall ? 0.9 : 0));
}

// 33 to 64 tokens, for which a prefill kernel may be faster: where tiles do not go round the pairs, and for large 2:4
// layers. (That pairs may get half a tile is not looked at.) Fitted, after the model of prefill kernels, to the
// kernels' times with 40, 48 and 64 tokens at 38 layers: where prefill kernels must be 5% better to be taken, a tenth
// of the gain is missed, and the four that are slower are so by up to 5%.
constexpr double kPrefillForCertain = 1.05;
double us_of_some_tokens(const DecodePlan& plan, double limit) {
  constexpr double kStart = 1.6;
  const DecodeTile& tile = plan.kernel.tile;
  const bool tall = tile.row_tiles == 2;
  const double of_1024_columns =
      tile.sparse ? (tall ? 2.19 + 0.0054 * tile.tokens : 1.05 + 0.0042 * tile.tokens)
                  : (tall ? 1.42 + 0.0232 * tile.tokens : 0.97 + 0.0167 * tile.tokens);
  const double end = tile.sparse ? 0.58 : tall ? 1.42 : 0.72;
  const int64_t of_pair = ceil_div(plan.row_tiles, plan.blocks / plan.cluster);
  const double most = static_cast<double>(of_pair) / plan.cluster;
  return (kStart + most * (columns_of_tile(plan) * of_1024_columns + end)) *
         (1 + kPowerLimit * limit);
}

// 1024 columns of a tile.
double us_of_1024_columns(const DecodeTile& tile, int token_tiles) {
  const bool tall = tile.row_tiles == 2;
  if (!tile.sparse) {
    if (!tall) return 0.42 + 0.021 * tile.tokens;
    return 0.62 + 0.036 * tile.tokens + (tile.tokens > 144 ? 0.3 : 0);
  }
  // Several 2:4 token tiles find weights in L2, but those of 64 rows read the more activations from there.
  if (!tall) return (0.65 + 0.012 * tile.tokens) * (token_tiles == 1 ? 1 : 1.06);
  return (0.99 + 0.024 * tile.tokens) * (token_tiles == 1 ? 1 : 0.95);
}

// Many tokens: every tile has an end, and one that a pair shares an exchange of sums. Where some pairs have a tile
// less than others, the next kernel's first pairs start there early; so it was where the others shared no tile. One
// token tile was faster than that. Fitted, with the model of prefill kernels, to times of those kernels that may be
// the fastest at 910 sizes of 65 to 8192 tokens: the kernel that the models take is 0.3 (dense) and 0.6% (2:4) slower
// on the mean than the fastest there is.
double us_of_many_tokens(const DecodePlan& plan, double limit) {
  constexpr double kStart = 0.9, kPerToken = 0.006, kExchange = 0.9, kHidden = 1.4;
  constexpr double kOneTokenTile = 0.97, kSparse = 0.97, kTall = 1.05, kDense = 1.02;
  const DecodeTile& tile = plan.kernel.tile;
  const bool tall = tile.row_tiles == 2;
  const double of_tile = columns_of_tile(plan) * us_of_1024_columns(tile, plan.token_tiles);
  const int64_t tiles = int64_t{plan.row_tiles} * plan.token_tiles,
                of_pair = ceil_div(tiles, plan.blocks / plan.cluster);
  const double most = static_cast<double>(of_pair) / plan.cluster;
  const double mean = static_cast<double>(tiles) / plan.blocks;
  const bool share_a_tile = of_pair % plan.cluster != 0;
  const double us = kStart + kPerToken * tile.tokens + most * (of_tile + (tall ? 2.7 : 1.8)) +
                    (share_a_tile ? kExchange : -std::min(kHidden, (most - mean) * of_tile));
  const double of_kind = tile.sparse ? kSparse : tall ? kTall : kDense;
  return us * (1 + kPowerLimit * limit) * of_kind * (plan.token_tiles == 1 ? kOneTokenTile : 1);
}

// The first kernel of the table for few tokens that suits.
std::optional<DecodePlan> select_for_few_tokens(const Problem& problem, bool runs) {
  for (const DecodeKernel& kernel : decode_kernels(problem.sparse)) {
    const bool suits_layer =
        runs || problem.n <= kernel.most_n || problem.n * problem.k <= kernel.most_weights;
    if (kernel.tile.runs != runs || kernel.tile.many_tokens() || !suits_layer) continue;
    if (!kernel.tile.looks_ahead(scale_period(problem))) continue;
    if (kernel.tile.tokens >= problem.m) return decode_plan_with(kernel, true, problem);
  }
  return std::nullopt;
}

// Whether there may be several. 2:4 layers with more multiplications are up to 14% slower that way,
// and wider dense ones were not timed so, nor were dense ones with more multiplications, nor more tokens (H200).
bool takes_several(const Problem& p) {
  constexpr int64_t kWide = 32768, kMost = 432, kMostOfSmall = 4096;
  constexpr double kSmall = 36e9;
  const double work =
      static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  return p.n <= kWide && p.m <= (work <= kSmall ? kMostOfSmall : kMost);
}

// Whether a plan is worth a look where there may be several token tiles. The model thinks too well (H200) of those
//   that leave a quarter of their tokens empty, unless all are done at once;
//   of up to 96 tokens, which one tile holds (2048 x 2048, M = 96: 4.8 us, as two tiles of 80 5.6);
//   of up to 128 that are not done at once (3072 x 3072, M = 128: 7.6, as two tiles of 80 8.5).
bool suits(const DecodePlan& plan, const Problem& p) {
  constexpr int64_t kOneTile = 96, kOneTileInTurn = 128;
  if (plan.token_tiles == 1) return true;
  const int64_t held = int64_t{plan.token_tiles} * plan.kernel.tile.tokens;
  const int64_t tiles = int64_t{plan.row_tiles} * plan.token_tiles;
  const bool at_once = tiles <= plan.blocks / plan.cluster;
  return at_once ? p.m > kOneTile : p.m > kOneTileInTurn && 3 * held < 4 * p.m;
}

// With many tokens the kernel that the model takes for the fastest; nothing where that is a prefill kernel.
std::optional<DecodePlan> select_for_many_tokens(const Problem& problem) {
  const bool several = takes_several(problem);
  const double limit = power_limit(problem);
  std::optional<DecodePlan> best;
  double least = 0;
  for (const DecodeKernel& kernel : decode_kernels(problem.sparse)) {
    const bool in_pairs = kernel.tile.many_tokens() && !kernel.tile.runs;
    if (!in_pairs || (!several && problem.m > kernel.tile.tokens)) continue;
    const DecodePlan plan = decode_plan_with(kernel, true, problem);
    if (!suits(plan, problem)) continue;
    const double us = us_of_many_tokens(plan, limit);
    if (best && us >= least) continue;
    least = us;
    best = plan;
  }
  return best && least < estimated_us(*select_prefill(problem), limit) ? best : std::nullopt;
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

DecodePlan decode_plan_with(const DecodeKernel& kernel, bool shares, const Problem& problem) {
  DecodePlan plan{};
  plan.kernel = kernel;
  plan.period = scale_period(problem);
  plan.row_blocks = static_cast<int>(ceil_div(problem.n, 64));
  plan.row_tiles = static_cast<int>(ceil_div(problem.n, kernel.tile.rows()));
  plan.token_tiles = static_cast<int>(ceil_div(problem.m, kernel.tile.tokens));
  plan.stages = static_cast<int>(ceil_div(problem.k, kernel.tile.stage_k()));
  const int pairs = shares && !kernel.tile.runs ? problem.device.pairs_at_once() : 0;
  plan.cluster = pairs > 0 ? 2 : 1;
  // Every multiprocessor gets a block, even where there are fewer tiles: with room for two blocks on
  // each, the next kernel's blocks then find exactly one place on every multiprocessor.
  plan.blocks = pairs > 0 ? 2 * pairs : problem.device.sm_count;
  plan.early_stages = early_stages(plan);
  plan.first_stages = first_stages(plan);
  return plan;
}

std::optional<DecodePlan> select_decode(const Problem& problem) {
  if (!problem.device.wgmma) return std::nullopt;
  const auto pairs = select_for_few_tokens(problem, false);
  if (!pairs) return select_for_many_tokens(problem);
  constexpr int64_t kFew = 32;
  if (problem.m > kFew) {
    const double limit = power_limit(problem);
    const double prefill = estimated_us(*select_prefill(problem), limit);
    return kPrefillForCertain * prefill < us_of_some_tokens(*pairs, limit) ? std::nullopt : pairs;
  }
  // Of the same rows only: where the table takes more of them, power is the bound, of which the model knows
  // nothing (57344 x 8192, M = 32: 84 us with runs of 64 rows, 79 with pairs of 128; H200).
  const auto runs = select_for_few_tokens(problem, true);
  const bool compare = runs && runs->kernel.tile.row_tiles == pairs->kernel.tile.row_tiles;
  return compare && kForCertain * us_of_few_tokens(*runs) < us_of_few_tokens(*pairs) ? runs : pairs;
}

}  // namespace marlin::plan
