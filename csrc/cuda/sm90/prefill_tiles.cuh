// What a prefill kernel (prefill.cuh) is told, its shape, and the order of its tiles.
#pragma once

#include "cuda/sm90/layer.h"
#include "cuda/sm90/partials.cuh"
#include "cuda/sm90/step.cuh"
#include "layout/sparse.h"
#include "plan/prefill.h"

namespace marlin::cuda::sm90 {

template <typename Element>
struct PrefillParams : LayerParams<Element> {
  int period_log2;       // of the columns between scales: 5, 6 or 7
  int groups_per_block;  // rows of scales from 64 columns of a stage to the next: 0 or 1
  int row_tiles, token_tiles;
  int token_group;  // token tiles that are done together (plan::TileOfOrder)
  int stages;       // of a tile
  // The first so many tiles in equal runs of stages, which blocks share over memory; and what they leave
  // (PrefillPartials).
  plan::StageRuns stage_runs;
  int shared_tiles;
  float* partials;
  uint64_t* partial_flags;
  // The outputs {n, m}, for the copy engine, in boxes of 64 features by a tile's tokens; not used where
  // copies_output is false: rows that are no multiple of 16 bytes.
  CUtensorMap output_map;
  bool copies_output;
};

template <int kTokens_, int kRowBlocks_, int kStageBlocks_, int kPeriod_, bool kSparse_>
struct PrefillShape {
  static constexpr plan::PrefillTile kTile{kTokens_, kRowBlocks_, kStageBlocks_, kSparse_};
  static constexpr int kTokens = kTokens_, kStageBlocks = kStageBlocks_;
  static constexpr int kPeriod = kPeriod_;  // 32: columns between scales. 64: or more
  static constexpr bool kSparse = kSparse_;
  static constexpr int kSets = 4 * kStepColumns<kSparse> / kPeriod;  // of scales, for a block
  static constexpr int kRowBlocks = kRowBlocks_, kRows = kTile.rows();
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kStages = kTile.stages(), kStageBytes = kTile.stage_bytes();
  static constexpr int kRowBlockBytes = kStageBlocks * layout::kBytesPerBlock;
  static constexpr int kMetaBytes = kStageBlocks * layout::kMetaBytesPerBlock;  // of a row block
  static constexpr int kInputAt = 0, kWeightsAt = kTile.input_bytes(), kMetaAt = kTile.meta_at();
  static constexpr int kScalesAt = kTile.scales_at(), kZerosAt = kTile.zeros_at();
  static constexpr int kOutputAt = kTile.output_at(), kBarriersAt = kTile.barriers_at();
  static constexpr int kSumsLeft = 1;  // a barrier of the block
  // Registers per thread: what a block's threads have at its launch, shared out anew among its roles. With four row
  // blocks more than 80 tokens would not fit, with three more than 160.
  static constexpr int kRegisters = 65536 / kTile.threads() / 8 * 8;
  static constexpr int kProducerRegisters = kRowBlocks == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kRowBlocks == 2 ? 232 : kRowBlocks == 3 ? 160 : 112;
  static_assert(kRowBlocks >= 2 && kRowBlocks <= 4);
  static_assert(kTokens <= (kRowBlocks == 2 ? 256 : kRowBlocks == 3 ? 160 : 80));
  static_assert(kProducerRegisters * 128 + kConsumerRegisters * kConsumers <=
                kRegisters * kTile.threads());
  // A stage has one row of scales where they are 128 columns or more apart; and every stage of sparse
  // weights is whole, so that none is multiplied without places.
  static_assert(kTile.stage_k() <= 128 && (!kSparse || kStageBlocks == 1));
  static_assert(kTile.weight_bytes() == kRowBlocks * kRowBlockBytes);
  static_assert(!kSparse || kTile.meta_bytes() == kRowBlocks * kMetaBytes);
  static_assert(kStages >= 3 && kStages <= 16 && kTokens % 16 == 0);
  // Where tensor copies find the outputs of a warpgroup, [kTokens][64], a pattern of the swizzle begins.
  static_assert(kStageBytes % 1024 == 0 && kOutputAt % 1024 == 0);
  // As copies want it.
  static_assert(kWeightsAt % 128 == 0 && kScalesAt % 128 == 0 && kZerosAt % 128 == 0);
  static_assert(kTokens <= 256 && kRows <= 256);
};

// A block's tiles: those of its run, from the last to the first, then every so-many-th of the rest, whole. What
// takes long to compute is kept for a tile.
template <typename Element, typename S>
struct PrefillCursor {
  const PrefillParams<Element>& p;
  int at = -1;               // tiles before this one
  int number, first, count;  // of this one; of its stages the block's first, and how many

  __device__ explicit PrefillCursor(const PrefillParams<Element>& params) : p(params) { advance(); }
  __device__ static int block() { return static_cast<int>(blockIdx.x); }
  __device__ void advance() {
    const auto run = plan::StageRun::of(p.stage_runs, block());
    if (++at < run.tiles) {
      number = run.last - at;
      first = run.first_stage(number, p.stages);
      count = run.end_stage(number, p.stages) - first;
    } else {
      number =
          plan::whole_tile(p.shared_tiles, static_cast<int>(gridDim.x), block(), at - run.tiles);
      first = 0;
      count = number < p.row_tiles * p.token_tiles ? p.stages : 0;
    }
  }
  __device__ bool valid() const { return count > 0; }
  __device__ int first_stage() const { return first; }
  __device__ int stages() const { return count; }
  __device__ bool sends() const { return first + count < p.stages; }
  __device__ bool gathers() const { return first > 0 && !sends(); }
  __device__ int first_sender() const { return p.stage_runs.first_sender(block(), number); }

  __device__ plan::TileOfOrder<PrefillParams<Element>> tile() const { return {p, number}; }
  __device__ int row_block() const { return tile().row_tile() * S::kRowBlocks; }
  __device__ int pieces() const { return min(S::kRowBlocks, p.n_blocks - row_block()); }
  __device__ int token() const { return tile().token_tile() * S::kTokens; }
  // The last of several token tiles begins early enough to be full, and does some tokens that the one before it
  // stores.
  __device__ int first_token() const { return max(min(token(), p.m - S::kTokens), 0); }
};

// What a block leaves of a tile that another stores: [row blocks][tokens / 8][128 threads][4], as threads have
// their sums, and for each row block a flag.
template <typename Element, typename S>
struct PrefillPartials {
  const PrefillParams<Element>& p;

  static_assert(S::kTile.partial_floats() == S::kRowBlocks * (S::kTokens / 8 * 128) * 4);

  __device__ float4* sums(int block, int row_block) const {
    return reinterpret_cast<float4*>(p.partials) +
           (block * S::kRowBlocks + row_block) * (S::kTokens / 8 * 128);
  }
  __device__ uint64_t* flag(int block, int row_block) const {
    return p.partial_flags + block * S::kRowBlocks + row_block;
  }
};

}  // namespace marlin::cuda::sm90
