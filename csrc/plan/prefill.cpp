#include "plan/prefill.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "plan/common.h"

namespace marlin::plan {
namespace {

#define MARLIN_SM90_PREFILL(tokens, row_blocks, stage_blocks, us_of_stage, reason) \
  PrefillKernel{0, PrefillTile{tokens, row_blocks, stage_blocks}, us_of_stage, reason},

auto dense_table() {
  return std::to_array<PrefillKernel>({
#include "plan/prefill_table.inc"
  });
}

auto sparse_table() {
  return std::to_array<PrefillKernel>({
#include "plan/prefill_24_table.inc"
  });
}

#undef MARLIN_SM90_PREFILL

// Of the tiles done at once, this many share a tile of weights, and on an H200 about as many bytes of
// activations and weights are then in use. From 4 to 16 made no difference beyond the noise; without
// groups, 8192 tokens at 28672 x 4096 took 10% longer.
constexpr int kTokenGroup = 8;
// Of runs, blocks that follow each other are at almost the same columns, and share what the tiles that follow each
// other have in common: activations, up to eight times as many bytes a stage as weights. 1024 x 8192,
// M = 8192: 204 us, in groups of 8 246; 8192 x 8192, M = 3072: 609 and 622 (H200).
constexpr int kTokenGroupOfRuns = 2;

// Whether a kernel is worth a look: none of as many rows leaves less room in as few tiles.
bool suits(const PrefillKernel& kernel, const Problem& problem) {
  const int64_t tiles = ceil_div(problem.m, kernel.tile.tokens);
  return std::ranges::none_of(prefill_kernels(problem.sparse), [&](const PrefillKernel& other) {
    return other.tile.row_blocks == kernel.tile.row_blocks &&
           other.tile.tokens < kernel.tile.tokens && other.tile.tokens * tiles >= problem.m;
  });
}

}  // namespace

std::span<const PrefillKernel> prefill_kernels(bool sparse) {
  static const auto dense = numbered(dense_table(), false);
  static const auto sparse_24 = numbered(sparse_table(), true);
  return sparse ? std::span<const PrefillKernel>(sparse_24) : dense;
}

std::string PrefillKernel::name() const {
  return (tile.sparse ? "sm90_prefill_24_t" : "sm90_prefill_t") + std::to_string(tile.tokens) +
         "_r" + std::to_string(tile.rows()) + "_k" + std::to_string(tile.stage_k());
}

PrefillPlan prefill_plan_with(const PrefillKernel& kernel, bool shares, const Problem& problem) {
  const PrefillTile& tile = kernel.tile;
  PrefillPlan plan{};
  plan.kernel = kernel;
  plan.period = scale_period(problem);
  plan.row_tiles = static_cast<int>(ceil_div(problem.n, tile.rows()));
  plan.token_tiles = static_cast<int>(ceil_div(problem.m, tile.tokens));
  plan.stages = static_cast<int>(ceil_div(problem.k, tile.stage_k()));
  const int tiles = plan.tiles(), most = problem.device.sm_count;
  shares = shares && tiles % most != 0 && plan.stages > 1;
  plan.token_group = shares ? kTokenGroupOfRuns : kTokenGroup;
  plan.blocks = std::min(tiles, most);
  if (shares) {
    plan.blocks = static_cast<int>(std::min<int64_t>(int64_t{tiles} * plan.stages, most));
    const int whole = std::max(tiles / plan.blocks - 1, 0);  // of each block
    plan.shared_tiles = tiles - whole * plan.blocks;
  }
  return plan;
}

// A stage takes what its table line says where blocks share tiles, and less where they do not and are at the
// same columns at the same time; every tile has an end. Blocks that share tiles write sums, and wait for and
// read those of others, of whom there are several where tiles are fewer than blocks. Fitted with decode.cpp's
// model for many tokens.
double estimated_us(const PrefillPlan& plan, double limit) {
  const double sums = plan.kernel.tile.partial_floats() / 32768.0;  // in tiles of 128 x 256
  // A tile of few tokens converts weights more often, which takes power: 2779 us with 128 tokens, 2685 with 256 at
  // 28672 x 4096, M = 8192 (H200).
  constexpr double kConversions = 0.03;
  const double conversions = kConversions * (1 - plan.kernel.tile.tokens / 256.0);
  const double each = static_cast<double>(plan.tiles()) / plan.blocks;
  if (plan.shared_tiles == 0) {
    constexpr double kStart = 1.8, kPace = 0.885, kPowerLimitWhole = 0.18, kEnd = 0.75,
                     kEndOfSums = 0.9;
    const double of_stage =
        plan.kernel.us_of_stage * kPace * (1 + (kPowerLimitWhole + conversions) * limit);
    return kStart + std::ceil(each) * (plan.stages * of_stage + kEnd + kEndOfSums * sums);
  }
  constexpr double kStart = 2.2, kExchange = 0.6, kSums = 3, kMoreSums = 1.7, kTile = 0.9;
  const double of_stage = plan.kernel.us_of_stage * (1 + (kPowerLimit + conversions) * limit);
  const double more_senders = std::max(1 / each - 1, 0.0);
  const double exchange =
      kExchange + (kSums + kMoreSums * more_senders) * sums + kTile * std::max(each, 1.0);
  return kStart + std::ceil(each * plan.stages) * of_stage + exchange;
}

std::optional<PrefillPlan> select_prefill(const Problem& problem) {
  if (!problem.device.wgmma) return std::nullopt;
  const double limit = power_limit(problem);
  std::optional<PrefillPlan> best;
  double least = 0;
  for (const PrefillKernel& kernel : prefill_kernels(problem.sparse)) {
    if (!suits(kernel, problem)) continue;
    for (const bool shares : {false, true}) {
      const PrefillPlan plan = prefill_plan_with(kernel, shares, problem);
      if (shares && plan.shared_tiles == 0) continue;  // the same again
      const double us = estimated_us(plan, limit);
      if (best && us >= least) continue;
      best = plan;
      least = us;
    }
  }
  return best;
}

}  // namespace marlin::plan
