// The planner: every problem gets a kernel that fits, and its partition does all work exactly once.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

#include "plan/common.h"
#include "plan/decode.h"
#include "plan/plan.h"
#include "plan/prefill.h"

namespace {

using namespace marlin::plan;

Device device_of(int sm, int sms) { return {sm, sms, shared_bytes_of(sm)}; }

const std::vector<Device> kDevices = {device_of(80, 108), device_of(86, 84), device_of(89, 142),
                                      device_of(90, 132), device_of(120, 188)};

TEST(Plan, TablesAreNumberedAndNamed) {
  std::map<std::string, int> names;
  for (const bool sparse : {false, true}) {
    int id = 0;
    for (const Kernel& kernel : sparse ? sparse_kernels() : kernels()) {
      EXPECT_EQ(kernel.id, id++);
      EXPECT_EQ(kernel.tile.sparse, sparse);
      EXPECT_EQ(++names[kernel.name()], 1) << kernel.name() << " stands twice in the tables";
      EXPECT_STRNE(kernel.reason, "");
      EXPECT_LE(kernel.tile.threads(), 1024);
      EXPECT_GE(kernel.tile.stages, 2) << "a stage must be on its way while another is multiplied";
    }
  }
}

TEST(Plan, EveryDeviceHasAKernelThatFits) {
  for (const Device& device : kDevices) {
    for (int64_t m : {1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 100, 4099}) {
      for (const bool sparse : {false, true}) {
        const Plan plan = select({m, 4096, 4096, 128, device, sparse});
        EXPECT_EQ(plan.kernel.tile.sparse, sparse);
        EXPECT_LE(plan.kernel.tile.shared_bytes(), device.shared_bytes);
        EXPECT_GE(plan.kernel.tile.tokens, std::min<int64_t>(m, 64));
      }
    }
  }
}

TEST(Plan, EveryKernelIsSomeDevicesChoice) {
  for (const bool sparse : {false, true}) {
    std::map<int, int> chosen;
    for (const Device& device : kDevices) {
      for (int64_t m : {8, 16, 32, 64}) {
        ++chosen[select({m, 4096, 4096, 128, device, sparse}).kernel.id];
      }
    }
    EXPECT_EQ(chosen.size(), (sparse ? sparse_kernels() : kernels()).size());
  }
}

// Written out for one tile: a sparse block stands for 128 columns, and brings 1 KB of metadata.
TEST(Plan, TilesOfSparseWeightsCountTheColumnsOfActivations) {
  constexpr Tile kDense{16, 2, 4, 1, 3}, kSparse{16, 2, 4, 1, 3, true};
  EXPECT_EQ(kDense.stage_k(), 256);
  EXPECT_EQ(kSparse.stage_k(), 512);
  EXPECT_EQ(kDense.weight_bytes(), 4 * 2 * 2048);
  EXPECT_EQ(kSparse.weight_bytes(), kDense.weight_bytes());
  EXPECT_EQ(kSparse.meta_bytes(), 4 * 2 * 1024);
  EXPECT_EQ(kDense.meta_bytes(), 0);
  EXPECT_EQ(kSparse.input_bytes(), 16 * 512 * 2);
  EXPECT_EQ(kSparse.scale_rows(), 16);
  EXPECT_EQ(kSparse.stage_bytes(), 16384 + 8192 + 16384 + 16 * 128 * 3);
  EXPECT_EQ(kSparse.threads(), kDense.threads());
}

TEST(Plan, DeviceWithoutKernelsIsRefused) {
  EXPECT_THROW(select({1, 64, 64, 64, device_of(75, 40)}), std::runtime_error);
  EXPECT_THROW(select({1, 64, 64, 64, device_of(75, 40), true}), std::runtime_error);
}

// What the kernels do with a partition, in miniature: blocks walk their units and note, per tile,
// which part of k they did and where they left it; the reduction must find exactly that.
void check_partition(const Problem& problem) {
  const Plan plan = select(problem);
  const Partition& part = plan.partition;
  ASSERT_GE(part.row_tiles * int64_t{plan.kernel.tile.rows()}, problem.n);
  ASSERT_GE(part.token_tiles * int64_t{plan.kernel.tile.tokens}, problem.m);
  ASSERT_GE(part.units_per_tile * int64_t{plan.kernel.tile.stage_k()}, problem.k);
  ASSERT_LE(part.blocks, problem.device.sm_count);
  ASSERT_LT(part.units_per_block, int64_t{1} << 31);

  struct Segment {
    int64_t block, slot, begin, end;
  };
  std::map<int64_t, std::vector<Segment>> tiles;
  for (int64_t block = 0; block < part.blocks; ++block) {
    const int64_t begin = block * part.units_per_block;
    const int64_t end = std::min(begin + part.units_per_block, part.units());
    ASSERT_LT(begin, end) << "an idle block";
    std::vector<bool> used(2, false);
    for (int64_t unit = begin, segment = 0; unit < end; ++segment) {
      const int64_t tile = unit / part.units_per_tile;
      const int64_t stop = std::min((tile + 1) * part.units_per_tile, end);
      const int64_t slot = std::min<int64_t>(segment, 1);  // as BlockGemm::run numbers them
      if (stop - unit < part.units_per_tile) {
        ASSERT_FALSE(used[slot]) << "two partial tiles in one slot";
        used[slot] = true;
        ASSERT_EQ(part.slot(block, tile), slot);
      }
      tiles[tile].push_back({block, slot, unit, stop});
      unit = stop;
    }
  }
  ASSERT_EQ(static_cast<int64_t>(tiles.size()), part.tiles());
  for (const auto& [tile, segments] : tiles) {
    ASSERT_EQ(part.first_block(tile), segments.front().block);
    ASSERT_EQ(part.last_block(tile), segments.back().block);
    int64_t at = tile * part.units_per_tile;
    for (const Segment& segment : segments) {
      ASSERT_EQ(segment.begin, at) << "k is not covered in order";
      at = segment.end;
    }
    ASSERT_EQ(at, (tile + 1) * part.units_per_tile);
    if (segments.size() > 1) {
      ASSERT_TRUE(part.splits_tiles());
      ASSERT_GT(plan.workspace_bytes, 0);
    }
  }
}

TEST(Plan, PartitionDoesEverythingOnce) {
  std::mt19937 random(3);
  const auto up_to = [&](int64_t most) { return 1 + static_cast<int64_t>(random() % most); };
  for (int i = 0; i < 3000; ++i) {
    Problem problem{up_to(i % 3 ? 70 : 600), up_to(9000), up_to(9000), 128,
                    kDevices[random() % kDevices.size()]};
    problem.sparse = i % 2 == 0;
    if (i % 5 == 0) problem.device.sm_count = static_cast<int>(up_to(200));
    ASSERT_NO_FATAL_FAILURE(check_partition(problem))
        << problem.m << " x " << problem.n << " x " << problem.k << " on "
        << problem.device.sm_count;
  }
}

// Where blocks share tiles over memory: the one with a tile's last stages does them last, and the others, of
// lower numbers, theirs first.
void check_runs(const StageRuns& runs, int blocks, int tiles) {
  const int stages = runs.stages;
  std::vector<int> done(static_cast<size_t>(tiles) * stages), sharing(tiles);
  int most = 0, least = tiles * stages;
  for (int block = 0; block < blocks; ++block) {
    const auto run = StageRun::of(runs, block);
    ASSERT_EQ(run.tiles > 0, run.end > run.begin);
    for (int i = 0; i < run.tiles; ++i) {
      const int at = run.last - i;
      const int first = run.first_stage(at, stages), end = run.end_stage(at, stages);
      ASSERT_LT(first, end);
      for (int stage = first; stage < end; ++stage) {
        ++done[static_cast<size_t>(at) * stages + stage];
      }
      if (end - first == stages) continue;
      ++sharing[at];
      const int sender = runs.first_sender(block, at);
      ASSERT_LE(runs.begin(sender), at * stages);
      ASSERT_GT(runs.begin(sender + 1), at * stages);
      ASSERT_TRUE(end == stages ? i == run.tiles - 1 : i == 0);
    }
    most = std::max(most, run.end - run.begin);
    least = std::min(least, run.end - run.begin);
  }
  ASSERT_LE(most - least, 1) << "work is not shared equally";
  for (const int times : done) ASSERT_EQ(times, 1);
  for (const int blocks : sharing) ASSERT_NE(blocks, 1);
  const bool share = std::ranges::any_of(sharing, [](int count) { return count > 0; });
  ASSERT_TRUE(runs.share_tiles() || !share);
}

// Pairs of blocks name the same tile, and the same half, as shared; whole tiles, shared ones and halves are
// all there are, once each.
void check_pairs(const DecodePlan& plan) {
  const DecodeTile& tile = plan.kernel.tile;
  const DecodeDeal deal = plan.deal();
  const int parts = tile.row_tiles;  // of a tile: 64 rows each
  const int tiles = plan.row_tiles * plan.token_tiles;
  std::vector<int> done(static_cast<size_t>(tiles) * parts * plan.stages);
  const auto note = [&](int part, int count, int first, int stages) {
    for (int i = part; i < part + count; ++i) {
      for (int stage = first; stage < first + stages; ++stage) {
        ++done[static_cast<size_t>(i) * plan.stages + stage];
      }
    }
  };
  int most = 0, least = 4 * tiles;  // of quarters of tiles of a block
  for (int block = 0; block < plan.blocks; ++block) {
    const auto share = DecodeShare::of(deal, block);
    const auto pair = DecodeShare::of(deal, block ^ 1);
    ASSERT_EQ(share.rank, block % plan.cluster);
    ASSERT_EQ(share.shared, plan.cluster == 1 ? -1 : pair.shared);
    ASSERT_EQ(share.half, plan.cluster == 1 ? -1 : pair.half);
    note(share.first * parts, share.whole * parts, 0, plan.stages);
    const int first = share.first_shared_stage(plan.stages),
              stages = share.shared_stages(plan.stages);
    if (share.shared >= 0) note(share.shared * parts, parts, first, stages);
    if (share.half >= 0) {
      ASSERT_TRUE(tile.cuts_tiles());
      ASSERT_EQ(plan.token_tiles, 1);
      note(share.half, 1, first, stages);
    }
    const int quarters = 4 * share.whole + 2 * (share.shared >= 0) + (share.half >= 0);
    most = std::max(most, quarters);
    least = std::min(least, quarters);
  }
  // The last tile's second half may lie past the rows.
  const auto there =
      static_cast<size_t>(deal.halves ? plan.row_blocks : tiles * parts) * plan.stages;
  for (size_t i = 0; i < done.size(); ++i) ASSERT_EQ(done[i], i < there);
  const int apart = deal.halves ? 1 : plan.cluster == 2 ? 2 : 4;
  ASSERT_LE(most - least, apart) << "work is not shared equally";
}

// What the decode kernels do with a plan, in miniature: every stage of every tile is some block's, once.
void check_decode(const Problem& problem, const DecodePlan& plan) {
  const DecodeTile& tile = plan.kernel.tile;
  ASSERT_EQ(tile.sparse, problem.sparse);
  ASSERT_TRUE(tile.holds(problem.m));
  ASSERT_LT((plan.token_tiles - 1) * int64_t{tile.tokens}, problem.m);
  ASSERT_GE(plan.token_tiles * int64_t{tile.tokens}, problem.m);
  ASSERT_LT((plan.row_tiles - 1) * int64_t{tile.rows()}, problem.n);
  ASSERT_GE(plan.row_tiles * int64_t{tile.rows()}, problem.n);
  ASSERT_GE(plan.stages * int64_t{tile.stage_k()}, problem.k);
  ASSERT_EQ(plan.blocks % plan.cluster, 0);
  ASSERT_LE(plan.blocks, problem.device.sm_count);
  if (tile.runs) {
    ASSERT_EQ(plan.cluster, 1);
    ASSERT_NO_FATAL_FAILURE(
        check_runs(plan.runs(), plan.blocks, plan.row_tiles * plan.token_tiles));
    ASSERT_EQ(plan.partial_bytes() > 0, plan.runs().share_tiles());
    return;
  }
  ASSERT_EQ(plan.partial_bytes(), 0);
  ASSERT_NO_FATAL_FAILURE(check_pairs(plan));
}

TEST(Plan, DecodeGridsDoEverythingOnce) {
  std::mt19937 random(4);
  const auto up_to = [&](int64_t most) { return 1 + static_cast<int64_t>(random() % most); };
  for (int i = 0; i < 2000; ++i) {
    const bool narrow = i % 2 != 0;
    Problem problem{up_to(narrow ? 460 : 64), up_to(narrow ? 16384 : 60000), up_to(30000), 128,
                    device_of(90, 132)};
    problem.device.wgmma = true;
    problem.sparse = i % 3 == 0;
    if (problem.sparse) problem.k = (problem.k + 3) / 4 * 4;
    if (i % 5 == 0) problem.device.sm_count = static_cast<int>(up_to(200));
    const auto plan = select_decode(problem);
    ASSERT_TRUE(plan.has_value() || problem.m > 32);
    if (plan) {
      ASSERT_NO_FATAL_FAILURE(check_decode(problem, *plan));
    }
    const auto kernels = decode_kernels(problem.sparse);
    const auto& kernel = kernels[random() % kernels.size()];
    problem.m = up_to(kernel.tile.many_tokens() ? 600 : kernel.tile.tokens);
    for (const bool shares : {false, true}) {
      ASSERT_NO_FATAL_FAILURE(check_decode(problem, decode_plan_with(kernel, shares, problem)));
    }
  }
  EXPECT_FALSE(select_decode({1, 64, 64, 64, device_of(90, 132)}).has_value());  // no wgmma
}

TEST(Plan, DecodeCutsTilesThatAreLeftOver) {
  const auto deal = [](int64_t m, int64_t n, bool sparse = false) {
    Problem problem{m, n, 4096, 128, device_of(90, 132), sparse};
    problem.device.wgmma = true;
    return select_decode(problem)->deal();
  };
  const DecodeDeal cut = deal(64, 28672);  // 224 tiles of 128 rows, 66 pairs
  EXPECT_EQ(cut.each, 3);
  EXPECT_EQ(cut.more, 0);
  EXPECT_EQ(cut.halves, 52);
  EXPECT_EQ(cut.first_half, 396);
  const DecodeShare share = DecodeShare::of(cut, 102);  // the last pair with a half
  EXPECT_EQ(share.half, 396 + 51);
  EXPECT_EQ(share.shared, 51 * 3 + 2);
  EXPECT_EQ(share.whole, 1);
  EXPECT_EQ(DecodeShare::of(cut, 104).half, -1);
  EXPECT_EQ(deal(48, 10240).halves, 28);
  EXPECT_EQ(deal(64, 8192).halves, 0);         // 64 tiles: a half for every pair would not do
  EXPECT_EQ(deal(64, 57344).halves, 0);        // 52 tiles left over
  EXPECT_EQ(deal(64, 28672, true).halves, 0);  // 2:4
  EXPECT_EQ(deal(32, 28672).halves, 0);
}

// What was the fastest of the kernels on an H200, by 3% and more.
TEST(Plan, ManyTokensTakeWhatWasMeasuredToBeFastest) {
  struct Case {
    int64_t m, n, k;
    bool sparse;
    const char* kernel;
    bool shares;  // of prefill kernels
  };
  for (const Case& c :
       std::initializer_list<Case>{{208, 4096, 11008, false, "decode_t112_r128_k128_s1", true},
                                   {100, 7168, 2048, false, "decode_t112_r64_k128_s2", true},
                                   {240, 4096, 11008, false, "decode_t128_r128_k128_s1", true},
                                   {500, 1024, 8192, false, "decode_t128_r64_k128_s2", true},
                                   {264, 4096, 11008, false, "decode_t144_r128_k128_s1", true},
                                   {136, 4096, 14336, false, "decode_t144_r64_k128_s2", true},
                                   {160, 8192, 8192, false, "decode_t160_r128_k128_s1", true},
                                   {144, 4096, 512, false, "decode_t80_r64_k128_s3", true},
                                   {168, 4096, 4096, false, "decode_t96_r64_k128_s3", true},
                                   {1152, 1536, 4096, false, "prefill_t112_r128_k128", false},
                                   {100, 5120, 13824, false, "prefill_t112_r128_k128", true},
                                   {544, 4608, 3584, false, "prefill_t112_r192_k128", false},
                                   {100, 57344, 8192, false, "prefill_t112_r192_k128", true},
                                   {736, 2560, 2560, false, "prefill_t128_r128_k128", false},
                                   {120, 10240, 8192, false, "prefill_t128_r128_k128", true},
                                   {480, 6144, 4096, false, "prefill_t128_r192_k128", false},
                                   {128, 128256, 4096, false, "prefill_t128_r192_k128", true},
                                   {272, 7168, 2048, false, "prefill_t144_r128_k128", false},
                                   {136, 5120, 13824, false, "prefill_t144_r128_k128", true},
                                   {432, 7168, 2048, false, "prefill_t144_r192_k64", false},
                                   {272, 27648, 5120, false, "prefill_t144_r192_k64", true},
                                   {304, 8192, 1024, false, "prefill_t160_r128_k64", false},
                                   {304, 37888, 3584, false, "prefill_t160_r192_k64", false},
                                   {320, 128256, 4096, false, "prefill_t160_r192_k64", true},
                                   {688, 4096, 4096, false, "prefill_t176_r128_k64", false},
                                   {352, 14336, 4096, false, "prefill_t176_r128_k64", true},
                                   {3072, 1024, 1024, false, "prefill_t192_r128_k64", false},
                                   {184, 128256, 4096, false, "prefill_t192_r128_k64", true},
                                   {608, 11008, 4096, false, "prefill_t208_r128_k64", false},
                                   {200, 27648, 5120, false, "prefill_t208_r128_k64", true},
                                   {1024, 4096, 11008, false, "prefill_t256_r128_k64", false},
                                   {2560, 3584, 18944, false, "prefill_t256_r128_k64", true},
                                   {152, 7168, 2048, false, "prefill_t80_r128_k128", false},
                                   {80, 2048, 14336, false, "prefill_t80_r128_k128", true},
                                   {400, 4608, 3584, false, "prefill_t80_r192_k128", false},
                                   {66, 57344, 8192, false, "prefill_t80_r192_k128", true},
                                   {176, 7168, 2048, false, "prefill_t96_r128_k128", false},
                                   {96, 5120, 13824, false, "prefill_t96_r128_k128", true},
                                   {500, 2048, 14336, true, "decode_24_t128_r128_k128_s1", true},
                                   {128, 4096, 11008, true, "decode_24_t128_r64_k128_s2", true},
                                   {66, 4096, 14336, true, "decode_24_t80_r64_k256_s2", true},
                                   {88, 256, 7168, true, "decode_24_t96_r64_k128_s2", true},
                                   {224, 7168, 5120, true, "prefill_24_t112_r128_k128", false},
                                   {112, 10240, 8192, true, "prefill_24_t112_r128_k128", true},
                                   {200, 11008, 4096, true, "prefill_24_t112_r192_k128", false},
                                   {200, 27648, 5120, true, "prefill_24_t112_r192_k128", true},
                                   {512, 4096, 11008, true, "prefill_24_t128_r128_k128", false},
                                   {512, 37888, 3584, true, "prefill_24_t128_r192_k128", false},
                                   {512, 57344, 8192, true, "prefill_24_t128_r192_k128", true},
                                   {144, 14336, 4096, true, "prefill_24_t144_r128_k128", false},
                                   {136, 3584, 14336, true, "prefill_24_t144_r128_k128", true},
                                   {832, 4096, 14336, true, "prefill_24_t144_r192_k128", false},
                                   {688, 5120, 5120, true, "prefill_24_t144_r192_k128", true},
                                   {960, 4096, 4096, true, "prefill_24_t160_r192_k128", false},
                                   {152, 28672, 4096, true, "prefill_24_t160_r192_k128", true},
                                   {184, 14336, 4096, true, "prefill_24_t192_r128_k128", false},
                                   {832, 1024, 1024, true, "prefill_24_t64_r128_k128", false},
                                   {152, 8192, 8192, true, "prefill_24_t80_r128_k128", false},
                                   {80, 11008, 4096, true, "prefill_24_t80_r128_k128", true},
                                   {80, 28672, 4096, true, "prefill_24_t80_r256_k128", false},
                                   {72, 57344, 8192, true, "prefill_24_t80_r256_k128", true},
                                   {272, 4608, 3584, true, "prefill_24_t96_r128_k128", false},
                                   {88, 10240, 8192, true, "prefill_24_t96_r128_k128", true},
                                   {384, 6144, 4096, true, "prefill_24_t96_r192_k128", false},
                                   {192, 18944, 3584, true, "prefill_24_t96_r192_k128", true},
                                   {448, 8192, 8192, false, "prefill_t224_r128_k64", false},
                                   {224, 57344, 8192, false, "prefill_t224_r128_k64", true}}) {
    Problem problem{c.m, c.n, c.k, 128, device_of(90, 132), c.sparse};
    problem.device.wgmma = true;
    const std::string what =
        std::to_string(c.n) + " x " + std::to_string(c.k) + ", M = " + std::to_string(c.m);
    const std::string kernel = std::string("sm90_") + c.kernel;
    if (const auto decode = select_decode(problem)) {
      EXPECT_EQ(decode->kernel.name(), kernel) << what;
    } else {
      const auto prefill = select_prefill(problem);
      EXPECT_EQ(prefill->kernel.name(), kernel) << what;
      EXPECT_EQ(prefill->shared_tiles > 0, c.shares) << what;
    }
  }
}

TEST(Plan, DecodeTakesTheFirstLineThatSuitsFewTokens) {
  struct Case {
    int64_t m, n, k;
    int tokens, splits, stage_blocks;
  };
  for (const Case& c : std::initializer_list<Case>{{1, 4096, 4096, 1, 3, 4},
                                                   {1, 4096, 14336, 1, 5, 4},
                                                   {1, 6144, 4096, 1, 5, 4},
                                                   {1, 8192, 8192, 1, 4, 8},
                                                   {8, 4096, 4096, 8, 3, 4},
                                                   {8, 6144, 4096, 8, 5, 4},
                                                   {8, 4096, 28672, 8, 5, 4},
                                                   {7, 8192, 8192, 7, 4, 8},
                                                   {8, 8192, 8192, 8, 4, 8},
                                                   {16, 4096, 4096, 16, 2, 4},
                                                   {16, 6144, 4096, 16, 4, 4},
                                                   {16, 28672, 8192, 16, 4, 4},
                                                   {16, 9216, 28672, 16, 4, 4},
                                                   {16, 55296, 5120, 16, 2, 4},
                                                   {64, 4096, 4096, 64, 3, 2},
                                                   {64, 8192, 8192, 64, 2, 2}}) {
    Problem problem{c.m, c.n, c.k, 128, device_of(90, 132)};
    problem.device.wgmma = true;
    const DecodeKernel kernel = select_decode(problem)->kernel;
    const std::string what = std::to_string(c.n) + " x " + std::to_string(c.k) +
                             ", M = " + std::to_string(c.m) + ": " + kernel.name();
    EXPECT_EQ(kernel.tile.tokens, c.tokens) << what;
    EXPECT_EQ(kernel.tile.splits, c.splits) << what;
    EXPECT_EQ(kernel.tile.stage_blocks, c.stage_blocks) << what;
  }
}

TEST(Plan, DecodeStartsWithWeightsWhereNoneWaitsForActivations) {
  const auto first = [](int64_t m, int64_t n, int64_t k) {
    Problem problem{m, n, k, 128, device_of(90, 132)};
    problem.device.wgmma = true;
    const DecodePlan plan = *select_decode(problem);
    EXPECT_LE(plan.first_stages, plan.early_stages);
    EXPECT_LT(plan.first_stages, plan.kernel.tile.stages(plan.period));
    return plan.first_stages;
  };
  EXPECT_EQ(first(1, 4096, 4096), 0);  // two blocks on a multiprocessor, and little to do for each
  EXPECT_EQ(first(1, 4096, 14336), 4);
  EXPECT_EQ(first(1, 57344, 8192), 4);
  EXPECT_EQ(first(16, 8192, 8192), 4);  // four splits
  EXPECT_EQ(first(64, 4096, 4096), 3);
}

TEST(Plan, DecodeAsksForFewWeightsEarlyWhereBlocksDoMuch) {
  const auto early = [](int64_t m, int64_t n, int64_t k) {
    Problem problem{m, n, k, 128, device_of(90, 132)};
    problem.device.wgmma = true;
    const auto plan = select_decode(problem);
    return std::pair(plan->early_stages, plan->kernel.tile.stages(plan->period));
  };
  const auto [few, ring] = early(1, 57344, 8192);
  EXPECT_EQ(few, 4);
  EXPECT_LT(few, ring);
  const auto [small, small_ring] = early(1, 4096, 4096);
  EXPECT_EQ(small, small_ring);
  EXPECT_EQ(early(16, 6144, 4096).first, 6);
  const auto [two_blocks, two_blocks_ring] = early(16, 4096, 4096);  // that fit a multiprocessor
  EXPECT_EQ(two_blocks, two_blocks_ring);
  const auto [tokens, tokens_ring] = early(32, 57344, 8192);
  EXPECT_EQ(tokens, tokens_ring);
}

std::vector<DecodeKernel> all_decode_kernels() {
  std::vector<DecodeKernel> all;
  for (const bool sparse : {false, true}) {
    const auto kernels = decode_kernels(sparse);
    all.insert(all.end(), kernels.begin(), kernels.end());
  }
  return all;
}

TEST(Plan, DecodeTablesAreNumberedAndNamed) {
  std::map<std::string, int> names;
  int next[2] = {};
  for (const DecodeKernel& kernel : all_decode_kernels()) {
    EXPECT_EQ(kernel.id, next[kernel.tile.sparse]++);
    EXPECT_EQ(++names[kernel.name()], 1) << kernel.name() << " stands twice in the tables";
    EXPECT_STRNE(kernel.reason, "");
    EXPECT_LE(kernel.tile.threads(), 1024);
    EXPECT_FALSE(kernel.tile.runs && kernel.tile.many_tokens()) << "the model has none";
  }
}

TEST(Plan, PrefillTablesAreNumberedAndNamed) {
  std::map<std::string, int> names;
  for (const bool sparse : {false, true}) {
    int id = 0;
    for (const PrefillKernel& kernel : prefill_kernels(sparse)) {
      EXPECT_EQ(kernel.id, id++);
      EXPECT_EQ(++names[kernel.name()], 1) << kernel.name() << " stands twice in the tables";
      EXPECT_STRNE(kernel.reason, "");
      EXPECT_LE(kernel.tile.threads(), 1024);
      EXPECT_LE(kernel.tile.shared_bytes(), PrefillTile::kSharedBytes);
      for (const PrefillKernel& other : prefill_kernels(sparse)) {  // a larger tile takes longer
        if (other.tile.rows() != kernel.tile.rows() || other.tile.tokens <= kernel.tile.tokens)
          continue;
        EXPECT_GT(other.us_of_stage / other.tile.stage_blocks,
                  kernel.us_of_stage / kernel.tile.stage_blocks)
            << other.name();
      }
    }
  }
}

TEST(Plan, DecodeKernelsFitAsOftenAsTheySay) {
  for (const DecodeKernel& kernel : all_decode_kernels()) {
    EXPECT_GE(kernel.tile.input_stages, 2 * kernel.tile.splits) << kernel.name();
    for (const int period : {32, 64, 128}) {
      EXPECT_LE(kernel.tile.shared_bytes(period) + DecodeTile::kReserved,
                DecodeTile::kMultiprocessorBytes / kernel.tile.blocks_per_sm)
          << kernel.name();
      EXPECT_GE(kernel.tile.stages(period), kernel.tile.splits) << kernel.name();
    }
  }
}

// 64 rows x 128 columns are 64 x 64 stored weights of 4 bits, and two places of 2 bits for every four
// columns.
TEST(Plan, SparseDecodeStagesHoldThreeBitsAColumn) {
  for (const DecodeKernel& kernel : all_decode_kernels()) {
    const DecodeTile& tile = kernel.tile;
    const int bits = tile.sparse ? 3 : 4;
    EXPECT_EQ(tile.stage_k(), (tile.sparse ? 128 : 64) * tile.stage_blocks) << kernel.name();
    EXPECT_EQ(tile.weight_bytes() * 8, tile.rows() * tile.stage_k() * bits) << kernel.name();
  }
}

TEST(Plan, SparseWeightsHaveKernelsForAnyNumberOfTokensOnHopper) {
  Problem problem{1, 8192, 8192, 128, device_of(90, 132), true};
  problem.device.wgmma = true;
  for (problem.m = 1; problem.m < 600; ++problem.m) {
    if (problem.m <= 32) {  // of more the model decides
      EXPECT_TRUE(select_decode(problem).has_value()) << problem.m;
    }
    EXPECT_TRUE(select_prefill(problem).has_value());
  }
  problem.device.wgmma = false;
  EXPECT_FALSE(select_decode(problem).has_value());
  EXPECT_FALSE(select_prefill(problem).has_value());
}

// Where some pairs would do twice as much as others, and that is worth more than sharing over memory costs.
TEST(Plan, DecodeSharesTilesOverMemoryWhereThatIsFaster) {
  const auto runs = [](int64_t m, int64_t n, int64_t k) {
    Problem problem{m, n, k, 128, device_of(90, 132)};
    problem.device.wgmma = true;
    const auto plan = select_decode(problem);
    return plan && plan->kernel.tile.runs;
  };
  for (const int m : {1, 16, 32}) {
    EXPECT_TRUE(runs(m, 5120, 27648)) << m;  // on an H200 8 to 36% faster
    EXPECT_FALSE(runs(m, 5120, 5120)) << m;  // 2 to 19% slower
    EXPECT_FALSE(runs(m, 4096, 4096)) << m;  // 34 to 40% slower
    EXPECT_FALSE(runs(m, 8192, 8192)) << m;
    EXPECT_FALSE(runs(m, 57344, 8192)) << m;
    EXPECT_FALSE(runs(m, 73728, 18432)) << m;
  }
}

// With 33 to 64 tokens prefill kernels do, and for large 2:4 layers as well.
TEST(Plan, SomeTokensTakePrefillKernelsWhereThatIsFaster) {
  const auto decodes = [](int64_t m, int64_t n, int64_t k, bool sparse) {
    Problem problem{m, n, k, 128, device_of(90, 132), sparse};
    problem.device.wgmma = true;
    return select_decode(problem).has_value();
  };
  for (const bool sparse : {false, true}) {
    for (const int m : {40, 48, 64}) {                         // on an H200
      EXPECT_EQ(decodes(m, 5120, 27648, sparse), false) << m;  // 16 to 40% slower
      EXPECT_TRUE(decodes(m, 4096, 4096, sparse)) << m;        // 60% faster
      EXPECT_TRUE(decodes(m, 8192, 8192, sparse)) << m;        // 12 to 30% faster
    }
  }
  EXPECT_FALSE(decodes(64, 57344, 8192, true));  // 9% slower
  EXPECT_FALSE(decodes(64, 28672, 4096, true));  // 9% slower

  const auto name = [](int64_t m, int64_t n, int64_t k, bool sparse) {
    Problem problem{m, n, k, 128, device_of(90, 132), sparse};
    problem.device.wgmma = true;
    return select_prefill(problem)->kernel.name();
  };
  EXPECT_EQ(name(48, 5120, 27648, false), "sm90_prefill_t48_r192_k128");
  EXPECT_EQ(name(64, 5120, 27648, false), "sm90_prefill_t64_r192_k128");
  EXPECT_EQ(name(48, 5120, 27648, true), "sm90_prefill_24_t48_r192_k128");
  EXPECT_EQ(name(64, 28672, 4096, true), "sm90_prefill_24_t64_r256_k128");
}

// Stages of 256 columns and near scales leave the 128-row kernel for 48 tokens no room to look ahead.
TEST(Plan, DecodeKernelsThatAreTakenLookAhead) {
  for (const int64_t group : {32, 64, 128}) {
    for (const bool sparse : {false, true}) {
      for (const int64_t n : {1024, 4096, 8192, 10240, 28672, 57344}) {
        for (int64_t m = 1; m <= 600; ++m) {
          Problem problem{m, n, 8192, group, device_of(90, 132), sparse};
          problem.device.wgmma = true;
          const auto plan = select_decode(problem);
          if (!plan) continue;
          ASSERT_TRUE(plan->kernel.tile.looks_ahead(plan->period))
              << plan->kernel.name() << ", M = " << m << ", groups of " << group;
        }
      }
    }
  }
  Problem problem{48, 10240, 8192, 128, device_of(90, 132)};
  problem.device.wgmma = true;
  EXPECT_EQ(select_decode(problem)->kernel.name(), "sm90_decode_t48_r128_k256_s2");
  problem.group_size = 64;
  EXPECT_EQ(select_decode(problem)->kernel.name(), "sm90_decode_t48_r128_k128_s2");
}

TEST(Plan, DecodePairsNeedADeviceThatRunsClusters) {
  Problem problem{1, 4096, 4096, 128, device_of(90, 132)};
  problem.device.wgmma = true;
  problem.device.pairs = -1;
  const auto plan = select_decode(problem);
  EXPECT_EQ(plan->cluster, 1);
  EXPECT_EQ(plan->blocks, 132);
  check_decode(problem, *plan);
}

// Every tile, once.
void check_order(const PrefillPlan& plan) {
  std::vector<int> done(static_cast<size_t>(plan.tiles()));
  for (int at = 0; at < plan.tiles(); ++at) {
    const TileOfOrder<PrefillPlan> tile{plan, at};
    ASSERT_LT(tile.token_tile(), plan.token_tiles);
    ASSERT_LT(tile.row_tile(), plan.row_tiles);
    ++done[static_cast<size_t>(tile.row_tile()) * plan.token_tiles + tile.token_tile()];
  }
  for (const int times : done) ASSERT_EQ(times, 1);
}

// What the prefill kernels do with a plan, in miniature: as PrefillCursor, block by block.
void check_prefill(const Problem& problem, const PrefillPlan& plan) {
  const PrefillTile& tile = plan.kernel.tile;
  ASSERT_EQ(tile.sparse, problem.sparse);
  ASSERT_GE(plan.row_tiles * int64_t{tile.rows()}, problem.n);
  ASSERT_LT((plan.row_tiles - 1) * int64_t{tile.rows()}, problem.n);
  ASSERT_GE(plan.token_tiles * int64_t{tile.tokens}, problem.m);
  ASSERT_LT((plan.token_tiles - 1) * int64_t{tile.tokens}, problem.m);
  ASSERT_GE(plan.stages * int64_t{tile.stage_k()}, problem.k);
  ASSERT_LE(tile.shared_bytes(), problem.device.shared_bytes);
  ASSERT_LE(plan.blocks, problem.device.sm_count);
  ASSERT_NO_FATAL_FAILURE(check_order(plan));
  ASSERT_NO_FATAL_FAILURE(check_runs(plan.stage_runs(), plan.blocks, plan.shared_tiles));
  ASSERT_EQ(plan.partial_bytes() > 0, plan.shared_tiles > 0);
  std::vector<int> done(static_cast<size_t>(plan.tiles()));  // stages
  int least = plan.tiles(), most = 0;                        // whole tiles of a block
  for (int block = 0; block < plan.blocks; ++block) {
    const StageRun run = StageRun::of(plan.stage_runs(), block);
    for (int i = 0; i < run.tiles; ++i) {
      const int number = run.last - i;
      done[number] += run.end_stage(number, plan.stages) - run.first_stage(number, plan.stages);
    }
    int whole = 0;
    for (;; ++whole) {
      const int number = whole_tile(plan.shared_tiles, plan.blocks, block, whole);
      if (number >= plan.tiles()) break;
      done[number] += plan.stages;
    }
    ASSERT_GT(run.tiles + whole, 0) << "an idle block";
    least = std::min(least, whole), most = std::max(most, whole);
  }
  for (const int stages : done) ASSERT_EQ(stages, plan.stages);
  ASSERT_LE(most - least, plan.shared_tiles ? 0 : 1);
  ASSERT_LT(plan.shared_tiles, 2 * plan.blocks);
}

TEST(Plan, PrefillDoesEverythingOnce) {
  std::mt19937 random(5);
  const auto up_to = [&](int64_t most) { return 1 + static_cast<int64_t>(random() % most); };
  for (int i = 0; i < 3000; ++i) {
    Problem problem{up_to(i % 2 ? 600 : 9000), up_to(9000), up_to(9000), 128, device_of(90, 132)};
    problem.device.wgmma = true;
    if (i % 3 == 0) problem.device.sm_count = static_cast<int>(up_to(200));
    problem.sparse = i % 4 == 0;
    const auto chosen = select_prefill(problem);
    ASSERT_TRUE(chosen.has_value());
    ASSERT_NO_FATAL_FAILURE(check_prefill(problem, *chosen));
    const auto kernels = prefill_kernels(problem.sparse);
    const auto& kernel = kernels[random() % kernels.size()];
    for (const bool shares : {false, true}) {
      const PrefillPlan plan = prefill_plan_with(kernel, shares, problem);
      ASSERT_NO_FATAL_FAILURE(check_prefill(problem, plan));
      const bool go_round = plan.tiles() % problem.device.sm_count == 0;
      ASSERT_EQ(plan.shared_tiles > 0, shares && !go_round && plan.stages > 1);
    }
  }
  EXPECT_FALSE(select_prefill({1, 64, 64, 64, device_of(90, 132)}).has_value());  // no wgmma
}

// The sizes of test_gemm.py's test_every_kernel and test_tiles_shared_over_memory, and of sanitizer_workload.py: with
// each kernel some blocks share tiles and then do whole ones.
TEST(Plan, TestsOnAGpuReachSharedAndWholeTiles) {
  const auto reaches = [](const PrefillKernel& kernel, std::vector<int64_t> ms, int64_t n,
                          int64_t k, std::initializer_list<int> sms) {
    return std::ranges::any_of(sms, [&](int count) {
      return std::ranges::any_of(ms, [&](int64_t m) {
        const Problem problem{m, n, k, 128, device_of(90, count), kernel.tile.sparse};
        const PrefillPlan plan = prefill_plan_with(kernel, true, problem);
        return plan.shared_tiles > 0 && plan.shared_tiles < plan.tiles();
      });
    });
  };
  for (const bool sparse : {false, true}) {
    for (const PrefillKernel& kernel : prefill_kernels(sparse)) {
      EXPECT_TRUE(reaches(kernel, {33, 300, 450}, 776, 700, {5, 7})) << kernel.name();
      const int64_t many = 16 * kernel.tile.tokens + 5;
      EXPECT_TRUE(reaches(kernel, {many}, 5056, 2048, {132})) << kernel.name();
    }
  }
}

TEST(Plan, LargestProblemsDoNotOverflow) {
  check_partition({65536, 106496, 53248, 128, device_of(90, 132)});
  check_partition({65536, 106496, 53248, 128, device_of(90, 132), true});
}

// Of sizes with more elements than memory holds (2^40), on a device that has little to deal them out to.
TEST(Plan, LargestProblemsDoNotOverflowOnHopper) {
  constexpr int64_t kMany = int64_t{1} << 20, kMost = (int64_t{1} << 31) - 1;
  for (const int sms : {1, 7, 132}) {
    for (const bool sparse : {false, true}) {
      for (const auto& [m, n, k] :
           std::initializer_list<std::array<int64_t, 3>>{{1, kMany, kMany},
                                                         {64, kMany, kMany},
                                                         {80, kMany, kMany},
                                                         {kMany, kMany, kMany},
                                                         {400000, 65536, 65536},
                                                         {kMost, 512, 512},
                                                         {1, kMost, 512},
                                                         {80, kMost, 512},
                                                         {2088, 2177, 494707316},
                                                         {1, 512, kMost - 3}}) {
        Problem problem{m, n, k, 128, device_of(90, sms), sparse};
        problem.device.wgmma = true;
        const std::string what =
            std::to_string(m) + ", " + std::to_string(n) + ", " + std::to_string(k);
        if (const auto plan = select_decode(problem)) {
          EXPECT_GE(int64_t{plan->row_tiles} * plan->kernel.tile.rows(), n) << what;
          EXPECT_GE(int64_t{plan->stages} * plan->kernel.tile.stage_k(), k) << what;
          if (plan->kernel.tile.runs) {
            EXPECT_EQ(plan->runs().begin(plan->blocks),
                      int64_t{plan->row_tiles} * plan->token_tiles * plan->stages)
                << what;
          }
        }
        for (const PrefillKernel& kernel : prefill_kernels(sparse)) {
          for (const bool shares : {false, true}) {
            const PrefillPlan plan = prefill_plan_with(kernel, shares, problem);
            EXPECT_EQ(plan.stage_runs().begin(plan.blocks),
                      int64_t{plan.shared_tiles} * plan.stages)
                << what;
            EXPECT_GT(estimated_us(plan, power_limit(problem)), 0) << what;
          }
        }
      }
    }
  }
}

}  // namespace
