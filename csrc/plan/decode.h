// The plan of a GEMM with few tokens on Hopper (cuda/sm90/decode.cuh): host C++, no CUDA, no torch.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "plan/plan.h"

namespace marlin::plan {

struct DecodeTile {
  int tokens, row_tiles, splits, stage_blocks, blocks_per_sm, input_stages;
  bool sparse = false;  // 2:4: a block of 64 x 64 stored weights covers 128 columns

  // Whether weights are scaled before they are multiplied, rather than the sums of groups after.
  constexpr bool scales_weights() const { return tokens > 96 && row_tiles > 1; }

  // There may then be more tokens than a tile holds.
  constexpr bool many_tokens() const { return tokens > 64; }
  constexpr bool holds(int64_t m) const { return m <= tokens || many_tokens(); }

  constexpr int rows() const { return 64 * row_tiles; }
  constexpr int stage_k() const { return (sparse ? 128 : 64) * stage_blocks; }
  constexpr int consumers() const { return 128 * row_tiles * splits; }
  constexpr int threads() const { return consumers() + 128; }  // and a warpgroup of helpers

  // Shared memory; offsets in bytes. First the ring of activations, whose swizzle wants 1024-byte
  // alignment; then the ring of weights (with their places where sparse), with scales and zero points
  // every `period` columns, on 128 bytes, as the copy engine wants them.
  constexpr int block_bytes() const { return 2048 + (sparse ? 1024 : 0); }
  constexpr int input_bytes() const { return tokens * stage_k() * 2; }  // of a stage, as the next
  constexpr int weight_bytes() const { return row_tiles * stage_blocks * block_bytes(); }
  constexpr int groups(int period) const { return stage_k() > period ? stage_k() / period : 1; }
  constexpr int scale_bytes(int period) const { return rows() * groups(period) * 2; }
  constexpr int zero_bytes(int period) const { return (rows() * groups(period) + 127) / 128 * 128; }
  constexpr int weights_at() const { return input_stages * input_bytes(); }
  constexpr int scales_at(int period) const {
    return weights_at() + stages(period) * weight_bytes();
  }
  constexpr int zeros_at(int period) const {
    return scales_at(period) + stages(period) * scale_bytes(period);
  }

  // Then fp32 sums [splits][pass_tokens][rows + 4], where 4 floats of padding spread a fragment's rows
  // over all banks; what the other block of a pair sends [tokens][rows / 2]; and the barriers. With many
  // tokens the sums leave in several passes, so that there is room for more stages.
  constexpr int passes() const {
    return tokens <= 64 ? 1 : tokens <= 128 ? 2 : tokens <= 144 ? 3 : 4;
  }
  constexpr int pass_tokens() const { return tokens / passes(); }
  constexpr int sum_stride() const { return rows() + 4; }
  constexpr int sum_bytes() const { return splits * pass_tokens() * sum_stride() * 4; }
  constexpr int partial_floats() const { return tokens * rows(); }
  constexpr int received_bytes() const { return tokens * rows() / 2 * 4; }
  constexpr int sums_at(int period) const {
    return zeros_at(period) + stages(period) * zero_bytes(period);
  }
  constexpr int received_at(int period) const { return sums_at(period) + sum_bytes(); }
  constexpr int barriers_at(int period) const { return received_at(period) + received_bytes(); }
  constexpr int shared_bytes(int period) const { return barriers_at(period) + kBarrierBytes; }

  // While a block does so many stages, one warp has stored a tile. (100 cycles for every 32 x 4 sums; memory
  // gives a multiprocessor of an H200 19 bytes a cycle.)
  constexpr int stages_to_store() const { return tokens * rows() * 15 / weight_bytes() + 1; }

  // As many stages of weights as fit, a multiple of the splits: a slot must always be the same split's.
  static constexpr int kSharedBytes = 228 * 1024;  // of a multiprocessor
  static constexpr int kReserved = 1024;           // of it, for each block
  static constexpr int kMostStages = 24, kBarrierBytes = 8 * (4 * kMostStages + 4);
  constexpr int stages(int period) const {
    const int room = kSharedBytes / blocks_per_sm - kReserved - weights_at() - sum_bytes() -
                     received_bytes() - kBarrierBytes;
    const int each = weight_bytes() + scale_bytes(period) + zero_bytes(period);
    const int fit = room / each < kMostStages ? room / each : kMostStages;
    return fit / splits * splits;
  }

  // Of weights, that a block may ask for before anything else; the ring never starts full.
  constexpr int most_first_stages(int period) const {
    return stages(period) > 4 ? 4 : stages(period) - 1;
  }
};

struct DecodeKernel {
  int id;  // its place in its table
  DecodeTile tile;
  int64_t most_n, most_weights;  // with few tokens: a layer with more of both takes a later line
  const char* reason;
  std::string name() const;
};

// Of decode_table.inc, or of decode_24_table.inc.
std::span<const DecodeKernel> decode_kernels(bool sparse = false);

// Divides by a number that only the host knows: on the device a division would hold up the first copy.
struct Divisor {
  uint64_t inverse;  // of the number, in 2^-64

  static constexpr Divisor of(int number) { return {~uint64_t{0} / static_cast<uint64_t>(number)}; }
  constexpr int quotient(int value) const {  // value >= 0
    const uint64_t next = static_cast<uint64_t>(value) + 1;
    return static_cast<int>((((inverse & 0xffffffffu) * next >> 32) + (inverse >> 32) * next) >>
                            32);
  }
};

// How a launch deals out its work. The stages of all tiles are numbered, k fastest, and every block gets
// a run of them. Clusters of two blocks get equal numbers of tiles but for one, and halve them; blocks
// alone get equal numbers of stages but for one.
struct DecodeDeal {
  int cluster;     // blocks: 1 or 2
  int stages;      // of a tile
  int each, more;  // tiles of every pair, or stages of every block, and how many get one more
  Divisor by_stages;

  static constexpr DecodeDeal of(int blocks, int cluster, int tiles, int stages) {
    const int units = cluster == 1 ? tiles * stages : tiles, shares = blocks / cluster;
    return {cluster, stages, units / shares, units % shares, Divisor::of(stages)};
  }
  constexpr int begin(int share) const { return share * each + (share < more ? share : more); }
  constexpr bool shares_tiles() const {
    return cluster > 1 ? each % 2 || more : each % stages || more;
  }
};

// The run of one block: stages begin .. end - 1 of all.
//
// A shared tile comes first in both blocks of a pair, so that what they send each other is there in time.
// Of blocks alone the one with the tile's last stages waits for the others, and does it last, and the
// others do it first. They are blocks of lower numbers, which are started before it.
struct DecodeRun {
  int begin, end;
  int tile, tiles;  // the one done first, and how many

  // Whether tiles follow in rising order, otherwise in falling order.
  static constexpr bool rises(const DecodeDeal& deal, int block) {
    return (block & (deal.cluster - 1)) != 0;
  }

  static constexpr DecodeRun of(const DecodeDeal& deal, int block) {
    const int share = block >> (deal.cluster - 1);
    DecodeRun run{deal.begin(share), deal.begin(share + 1), 0, 0};
    if (deal.cluster == 2) {
      run.begin *= deal.stages, run.end *= deal.stages;
      const int middle = run.begin + (run.end - run.begin + 1) / 2;
      (rises(deal, block) ? run.begin : run.end) = middle;
    }
    if (run.begin == run.end) return run;
    const int first = deal.by_stages.quotient(run.begin);
    const int last = deal.by_stages.quotient(run.end - 1);
    run.tiles = last - first + 1;
    run.tile = rises(deal, block) ? first : last;
    return run;
  }

  // Of a tile.
  constexpr int first_stage(int tile, int stages) const {
    const int first = begin - tile * stages;
    return first > 0 ? first : 0;
  }
  constexpr int end_stage(int tile, int stages) const {
    const int last = end - tile * stages;
    return last < stages ? last : stages;
  }
};

struct DecodePlan {
  DecodeKernel kernel;
  int period;  // columns between scales: 32, 64, or 128 for all longer groups
  int row_tiles, token_tiles;
  int stages;   // of a tile
  int cluster;  // 2: pairs of blocks share tiles; 1: blocks share them over global memory
  int blocks;
  // Of weights, with static_weights: copied while the kernel before may still run, and those of them that
  // are asked for at the very start of a block.
  int early_stages, first_stages;

  constexpr DecodeDeal deal() const {
    return DecodeDeal::of(blocks, cluster, row_tiles * token_tiles, stages);
  }
  // For every block the sums of a part of a tile, and for each pass a flag that says that they are there.
  constexpr int64_t partial_bytes() const {
    if (cluster > 1 || !deal().shares_tiles()) return 0;
    return int64_t{blocks} * (kernel.tile.partial_floats() * 4 + kernel.tile.passes() * 8);
  }
};

// Nothing where another kernel is to run: with many tokens, or on a device or build without wgmma.
std::optional<DecodePlan> select_decode(const Problem& problem);

DecodePlan decode_plan_with(const DecodeKernel& kernel, int cluster, const Problem& problem);

}  // namespace marlin::plan
