// The plan of a GEMM with few tokens on Hopper (cuda/sm90/decode.cuh): host C++, no CUDA, no torch.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "plan/plan.h"
#include "plan/runs.h"

namespace marlin::plan {

struct DecodeTile {
  int tokens, row_tiles, splits, stage_blocks, blocks_per_sm, input_stages;
  bool sparse = false;  // 2:4: a block of 64 x 64 stored weights covers 128 columns
  bool runs = false;    // blocks share tiles over global memory (StageRun), not in pairs

  // Whether weights are scaled before they are multiplied, rather than the sums of groups of `period` columns
  // after, which for a thread is tokens / 2 * step_k() / period multiplications a step: from 7 on, as measured;
  // with groups of 32 from 16 tokens on (dense: 4), since sums have to be waited for so often. (us, sums and
  // weights, H200. Groups of 128: 27.0 and 25.4 at 4096 x 14336, M = 128; 16.8 and 17.3 at 8192 x 8192, M = 64, but
  // 14.1 and 13.1 where 2:4. Groups of 32, 8192 x 8192: 13.0 and 12.4, M = 24; 11.4 and 11.1, M = 16.)
  constexpr bool scales_weights(int period) const {
    return tokens / 2 * step_k() >= 7 * period || (period == 32 && tokens >= 16);
  }

  // There may then be more tokens than a tile holds.
  constexpr bool many_tokens() const { return tokens > 64; }
  constexpr bool holds(int64_t m) const { return m <= tokens || many_tokens(); }

  // Whether a pair may get half a tile. It takes three quarters of a tile's time, since it wants as many activations:
  // 30.9 us and 29.9 at 28672 x 4096, M = 64, 28.5 and 23.6 at 10240 x 8192. With 32 tokens or 2:4 weights nothing is
  // gained, and where sums leave in passes the code for it costs more. (H200)
  constexpr bool cuts_tiles() const {
    return row_tiles == 2 && tokens > 32 && tokens <= 64 && !sparse && !runs;
  }

  constexpr int mma_tokens() const { return (tokens + 7) / 8 * 8; }  // of a multiplication

  // Whether a stage holds activations of as many tokens as there are, up to `tokens`, or always of `tokens`:
  // the distance between 64 columns and the next is then a constant, which saves instructions, but what is
  // missing costs the copy engine time, since it fills it with zeros. Fewer than 8 tokens lie without
  // a gap, and a multiplication reads what comes next for the rest of its 8, which nobody stores:
  //
  //     row of 128 bytes      0 1 2   3 4 5   6 7 8   9 10 11     3 tokens
  //     columns               0..63   64..    128..   192..       those of 64.. multiply rows 3 to 10
  constexpr bool input_tokens_vary() const { return tokens > 32 || (tokens > 1 && tokens < 8); }

  constexpr int rows() const { return 64 * row_tiles; }
  constexpr int step_k() const { return sparse ? 32 : 16; }  // columns of a multiplication
  constexpr int stage_k() const { return 4 * step_k() * stage_blocks; }
  constexpr int consumers() const { return 128 * row_tiles * splits; }
  constexpr int threads() const { return consumers() + 128; }  // and a warpgroup of helpers

  // Shared memory; offsets in bytes. First the ring of activations, whose swizzle wants 1024-byte
  // alignment; then the ring of weights (with their places where sparse), with scales and zero points
  // every `period` columns, on 128 bytes, as the copy engine wants them.
  constexpr int block_bytes() const { return 2048 + (sparse ? 1024 : 0); }
  constexpr int input_bytes() const {  // of a stage, as the next
    return (tokens * stage_k() * 2 + 1023) / 1024 * 1024;
  }
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
  // over all banks; what the other block of a pair sends [mma_tokens][rows / 2]; and the barriers. With many
  // tokens the sums leave in several passes, so that there is room for more stages.
  constexpr int passes() const {
    return tokens <= 64 ? 1 : tokens <= 128 ? 2 : tokens <= 144 ? 3 : 4;
  }
  constexpr int pass_tokens() const { return mma_tokens() / passes(); }
  constexpr int sum_stride() const { return rows() + 4; }
  constexpr int sum_bytes() const { return splits * pass_tokens() * sum_stride() * 4; }
  constexpr int partial_floats() const { return mma_tokens() * rows(); }
  constexpr int received_bytes() const { return runs ? 0 : mma_tokens() * rows() / 2 * 4; }
  constexpr int sums_at(int period) const {
    return zeros_at(period) + stages(period) * zero_bytes(period);
  }
  constexpr int received_at(int period) const { return sums_at(period) + sum_bytes(); }
  constexpr int barriers_at(int period) const { return received_at(period) + received_bytes(); }
  constexpr int shared_bytes(int period) const { return barriers_at(period) + kBarrierBytes; }

  // While a block does so many stages, one warp has stored a tile. (100 cycles for every 32 x 4 sums; memory
  // gives a multiprocessor of an H200 19 bytes a cycle.)
  constexpr int stages_to_store() const { return tokens * rows() * 15 / weight_bytes() + 1; }

  // As many stages of weights as fit, a multiple of the splits: a slot must always be the same split's. But no
  // more than 4096 columns, since copies are done in the order asked for, activations last: with 12 stages of
  // 512 instead of 8, M = 1 took 10.5 us for 10.0 at 8192 x 8192, 16.0 for 15.4 at 28672 x 4096 (H200).
  static constexpr int kMultiprocessorBytes = 228 * 1024;
  static constexpr int kReserved = 1024;  // of these, for each block
  static constexpr int kMostStages = 24, kBarrierBytes = 8 * (4 * kMostStages + 4);
  constexpr int stages(int period) const {
    const int room = kMultiprocessorBytes / blocks_per_sm - kReserved - weights_at() - sum_bytes() -
                     received_bytes() - kBarrierBytes;
    const int each = weight_bytes() + scale_bytes(period) + zero_bytes(period);
    const int most = 4096 / stage_k() < kMostStages ? 4096 / stage_k() : kMostStages;
    return (room / each < most ? room / each : most) / splits * splits;
  }

  // Whether every split has its next stage's weights asked for while it does one.
  constexpr bool looks_ahead(int period) const { return stages(period) >= 2 * splits; }

  // Of weights, that a block may ask for before their scales; the ring never starts full. Four where a stage is
  // of few activations (2:4, 8192 x 8192, M = 1: 7.6 us, with three 7.7) or every split's first is among them
  // (4096 x 14336, M = 16: 9.6 both, with two 9.7); else three: 11.2 and not 11.4 at 4096 x 14336, M = 32, 5.1
  // and 5.4 at 4096 x 4096; 2:4, 4096 x 14336, M = 16, 7.9 and 8.1 (H200).
  constexpr int most_first_stages(int period) const {
    const int most = splits > 3 || tokens <= 8 ? 4 : 3;
    return stages(period) > most ? most : stages(period) - 1;
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

// How a launch deals out its tiles: clusters of one block or two get runs of neighbouring tiles, equal
// but for one; or equal, where those left over are cut into halves, and these are no more than one for
// every pair (28672 rows are 224 tiles for 66 pairs: 3 each, and 52 pairs half a tile). The division is done
// here, on the host: on the device it would hold up the first copy.
struct DecodeDeal {
  int cluster;             // blocks: 1 or 2
  int each, more;          // tiles of every cluster, and how many clusters get one more
  int halves, first_half;  // how many get half a tile, and the first one's block of rows

  // `row_blocks`, of 64 rows: of tiles that may be cut; 0 where they may not.
  static constexpr DecodeDeal of(int blocks, int cluster, int tiles, int row_blocks) {
    const int clusters = blocks / cluster, each = tiles / clusters;
    const int first = 2 * each * clusters, left = row_blocks - first;
    if (cluster == 2 && left > 0 && left <= clusters) return {cluster, each, 0, left, first};
    return {cluster, each, tiles % clusters, 0, 0};
  }
};

// The tiles of one block: equal parts of its cluster's run. A tile or half a tile that is left over a
// pair shares: the first block does the first half of its k, and the other the rest.
//
//     rows      0  1 | 2  3 | 4  5 | 6  7 | 8  9 |10 11 |12    13 blocks of 64, 7 tiles for two pairs
//     block     0      1      0+1    2      3      2+3    0+1   every pair has 3, and one half a tile
struct DecodeShare {
  int first, whole;  // tiles first .. first + whole - 1
  int shared;        // the shared tile, done before them; -1: none
  int half;          // the rows of half a tile, done before that, as a block of 64; -1: none
  int rank;          // of the block in its cluster

  static constexpr DecodeShare of(const DecodeDeal& deal, int block) {
    const int log2 = deal.cluster - 1;  // of 1 or 2: also the mask of what a division leaves
    const int at = block >> log2, rank = block & log2;
    const int begin = at * deal.each + (at < deal.more ? at : deal.more);
    const int count = deal.each + (at < deal.more), whole = count >> log2;
    return {begin + rank * whole, whole, count & log2 ? begin + count - 1 : -1,
            at < deal.halves ? deal.first_half + at : -1, rank};
  }
  // A half of the stages of what is shared.
  constexpr int first_shared_stage(int stages) const { return rank == 0 ? 0 : (stages + 1) / 2; }
  constexpr int shared_stages(int stages) const {
    return rank == 0 ? (stages + 1) / 2 : stages / 2;
  }
};

namespace example {  // the picture above
inline constexpr DecodeDeal kDeal = DecodeDeal::of(4, 2, 7, 13);
inline constexpr DecodeShare kThird = DecodeShare::of(kDeal, 2);
static_assert(kDeal.each == 3 && kDeal.more == 0 && kDeal.halves == 1 && kDeal.first_half == 12);
static_assert(DecodeShare::of(kDeal, 0).half == 12 && DecodeShare::of(kDeal, 1).half == 12);
static_assert(DecodeShare::of(kDeal, 1).first == 1 && DecodeShare::of(kDeal, 1).shared == 2);
static_assert(kThird.first == 3 && kThird.whole == 1 && kThird.shared == 5 && kThird.half == -1);
static_assert(DecodeDeal::of(4, 2, 7, 0).more == 1);  // not cut: the first pair has a tile more
}  // namespace example

struct DecodePlan {
  DecodeKernel kernel;
  int period;  // columns between scales: 32, 64, or 128 for all longer groups
  int row_blocks, row_tiles, token_tiles;
  int stages;   // of a tile
  int cluster;  // 2: pairs of blocks that may share a tile; 1: launched without clusters
  int blocks;
  // Of weights, with static_weights: copied while the kernel before may still run, and those of them that
  // are asked for at the very start of a block.
  int early_stages, first_stages;

  constexpr DecodeDeal deal() const {
    return DecodeDeal::of(blocks, cluster, row_tiles * token_tiles,
                          kernel.tile.cuts_tiles() ? row_blocks : 0);
  }
  constexpr StageRuns runs() const {
    return StageRuns::of(blocks, row_tiles * token_tiles, stages);
  }
  // Where blocks share tiles over memory: the sums that each leaves, and for each pass a flag.
  constexpr int64_t partial_bytes() const {
    if (!kernel.tile.runs || !runs().share_tiles()) return 0;
    const DecodeTile& tile = kernel.tile;
    return int64_t{blocks} * (tile.partial_floats() * 4 + tile.passes() * 8);
  }
};

// Nothing where another kernel is to run: with many tokens, or on a device or build without wgmma.
std::optional<DecodePlan> select_decode(const Problem& problem);

// `shares`: whether pairs of blocks share a tile that is left over; not asked of kernels with runs.
DecodePlan decode_plan_with(const DecodeKernel& kernel, bool shares, const Problem& problem);

}  // namespace marlin::plan
