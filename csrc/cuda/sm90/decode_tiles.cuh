// What a decode kernel (decode.cuh) is told, its shape, and the order of its tiles.
#pragma once

#include <type_traits>

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sm90/layer.h"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/step.cuh"
#include "layout/sparse.h"
#include "plan/decode.h"

namespace marlin::cuda::sm90 {

template <typename Element>
struct DecodeParams : LayerParams<Element> {
  plan::DecodeDeal deal;
  int row_tiles, token_tiles;
  int stages;                      // of a tile
  int early_stages, first_stages;  // of weights (plan::DecodePlan)
  // Where blocks share tiles over memory (S::kRuns): their runs, and what each leaves, [S::kTokens][rows]
  // and [passes].
  plan::StageRuns runs;
  float* partials;
  uint64_t* partial_flags;
};

template <int kTokens_, int kRowTiles_, int kSplits_, int kStageBlocks_, int kBlocksPerSm_,
          int kInputStages_, bool kRuns_, int kPeriod_, bool kSparse_>
struct DecodeShape {
  static constexpr plan::DecodeTile kTile{kTokens_,      kRowTiles_,    kSplits_, kStageBlocks_,
                                          kBlocksPerSm_, kInputStages_, kSparse_, kRuns_};
  static constexpr bool kSparse = kSparse_, kRuns = kRuns_, kCutsTiles = kTile.cuts_tiles();
  static constexpr int kStepColumns = sm90::kStepColumns<kSparse_>;
  static constexpr int kTokens = kTile.mma_tokens(), kRowTiles = kRowTiles_, kSplits = kSplits_;
  static constexpr int kStageBlocks = kStageBlocks_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kPeriod = kPeriod_;  // columns between scales
  static constexpr bool kScalesWeights = kTile.scales_weights(kPeriod);
  // Symmetric weights have a loop without zero points, whose fewer instructions make it 1 to 5% faster, 2 to 7% with
  // groups of 64, 4 to 15% with groups of 32. But no faster, or slower: dense, 49 to 112 tokens by up to 2%; 2:4, 96
  // and 128 by 1 to 2%. (H200)
  static constexpr bool kPlainLoop = kSparse ? kTokens <= 80 : kTokens <= 48 || kTokens > 112;
  // Whether the producers keep the block's base in a register that the compiler knows to be the same in the whole warp,
  // or ask for it anew for every copy. 2:4 kernels are faster so, by 1% up to 8 tokens and 2% with 96. Together with a
  // shorter loop others were not, with 16 to 64 tokens; and dense ones 2 to 5% slower, up to 16, as their weights were
  // then asked for before the activations. (H200)
  static constexpr bool kKeepsBase = kSparse && (kTokens <= 8 || kTokens == 96);
  static constexpr int kStages = kTile.stages(kPeriod), kInputStages = kInputStages_;
  static constexpr int kFirstStages = kTile.most_first_stages(kPeriod);
  static constexpr int kGroups = kTile.groups(kPeriod);  // rows of scales in a stage
  static constexpr int kRows = kTile.rows(), kThreads = kTile.threads();
  static constexpr int kConsumers = kTile.consumers();
  // Of a stage of weights: for every row tile its blocks, then what metadata they have.
  static constexpr int kMetaBytes = kSparse ? layout::kMetaBytesPerBlock : 0;  // of a block
  static constexpr int kBlockBytes = layout::kBytesPerBlock + kMetaBytes;
  static constexpr int kMetaAt = kStageBlocks * layout::kBytesPerBlock;
  static constexpr int kStageMetaBytes = kRowTiles * kStageBlocks * kMetaBytes;
  static constexpr int kRowTileBytes = kStageBlocks * kBlockBytes;
  static constexpr int kInputBytes = kTile.input_bytes(), kWeightBytes = kTile.weight_bytes();
  static_assert(kWeightBytes == kRowTiles * kRowTileBytes);
  static_assert(kTile.stage_k() == kStageBlocks * layout::kWordsPerThread * kStepColumns &&
                kTile.step_k() == kStepColumns);
  static constexpr int kWeightsAt = kTile.weights_at();
  static constexpr int kScalesAt = kTile.scales_at(kPeriod), kZerosAt = kTile.zeros_at(kPeriod);
  static constexpr int kScaleBytes = kTile.scale_bytes(kPeriod);
  static constexpr int kZeroBytes = kTile.zero_bytes(kPeriod);
  static constexpr int kPasses = kTile.passes(), kPassTokens = kTile.pass_tokens();
  // Sums that leave in several passes are stored by the consumers, which would wait for one warp between
  // passes: 50.5 us for 47.9 at 28672 x 4096, M = 128, 83.3 for 80.2 at 8192 x 8192, M = 400 (H200).
  static constexpr bool kHasFinisher = kPasses == 1;
  static_assert(!kRuns || kHasFinisher);
  static constexpr int kSumStride = kTile.sum_stride(), kSumsAt = kTile.sums_at(kPeriod);
  static constexpr int kReceivedAt = kTile.received_at(kPeriod);
  static constexpr int kBarriersAt = kTile.barriers_at(kPeriod);
  // A group's sum is scaled at the end of its stage; scaled weights need no end of a group.
  static_assert(kScalesWeights || kTile.stage_k() >= kPeriod);
  static_assert(kStages > 0 && kStages % kSplits == 0);
  static_assert(kInputStages > 0 && kInputStages % kSplits == 0);
  static_assert(kStages <= plan::DecodeTile::kMostStages);
  static_assert(kInputStages <= plan::DecodeTile::kMostStages);
  static_assert(kPassTokens % 8 == 0 && kInputBytes % 1024 == 0);
  static_assert(!kTile.many_tokens() || kTokens == kTile.tokens);
  static_assert(8 * (2 * kStages + 2 * kInputStages + 4 + kPasses) <= kTile.kBarrierBytes);
  static_assert(!kCutsTiles || kPasses == 1);  // the finisher exchanges the sums of half a tile
  static_assert(kRows <= 256 && kScaleBytes % 128 == 0);  // as tensor copies want it

  // Registers per thread: what a block's threads have at its launch, shared out anew among its roles.
  static constexpr int kRegisters = 65536 / kBlocksPerSm / kThreads / 8 * 8;
  static constexpr int kHelperRegisters = kConsumers == 512 ? 32 : 40;
  static constexpr int kConsumerRegisters =
      (kRegisters * kThreads - kHelperRegisters * 128) / kConsumers / 8 * 8;
  static_assert(kHelperRegisters * 128 + kConsumerRegisters * kConsumers <= kRegisters * kThreads);
};

// The barriers of a block, by address.
template <typename S>
struct DecodeBarriers {
  uint32_t at;

  // Of every stage of weights and scales, and of activations.
  __device__ uint32_t full() const { return at; }
  __device__ uint32_t empty() const { return empty_after<S::kStages>(full()); }
  __device__ uint32_t input_full() const { return empty() + 8 * S::kStages; }
  __device__ uint32_t input_empty() const { return empty_after<S::kInputStages>(input_full()); }
  // Of the buffer of sums.
  __device__ uint32_t sums_full() const { return input_empty() + 8 * S::kInputStages; }
  __device__ uint32_t sums_free() const { return sums_full() + 8; }
  // Of what the other block of a pair sends; with kRuns, of all that other blocks leave.
  __device__ uint32_t received(int pass) const { return sums_free() + 8 + 8 * pass; }
  // Where tiles are cut: of what it sends of half a tile, and that it has read what this block sent of one.
  __device__ uint32_t received_half() const { return received(S::kPasses); }
  __device__ uint32_t room_free() const { return received_half() + 8; }

  // Those that the first copies of weights need, by the warp that asks for them.
  __device__ void init_first() const {
    if (!ptx::elect_one()) return;
#pragma unroll
    for (int i = 0; i < S::kFirstStages; ++i) init_full(i);
    ptx::mbarrier_init_fence();
  }
  // The rest, by all other warps, which share the work: a thread needs 20 cycles for each. Not by lanes: the
  // instruction wants an address that is the same in the warp.
  __device__ void init_others(int warp, int warps) const {
    if (!ptx::elect_one()) return;
#pragma unroll 1
    for (int i = warp; i < S::kStages; i += warps) {
      if (i >= S::kFirstStages) init_full(i);
      ptx::mbarrier_init(empty() + 8 * i, 128 * S::kRowTiles);
    }
#pragma unroll 1
    for (int i = warp; i < S::kInputStages; i += warps) {
      ptx::mbarrier_init(input_full() + 8 * i, 1);
      ptx::mbarrier_init(input_empty() + 8 * i, 128 * S::kRowTiles);
    }
    if (warp == warps - 1) {
      ptx::mbarrier_init(sums_full(), S::kConsumers);
      ptx::mbarrier_init(sums_free(), 32);
      for (int pass = 0; pass < S::kPasses; ++pass) ptx::mbarrier_init(received(pass), 1);
      if constexpr (S::kCutsTiles) {
        ptx::mbarrier_init(received_half(), 1);
        ptx::mbarrier_init(room_free(), 32);
      }
    }
    ptx::mbarrier_init_fence();
  }

 private:
  // Weights, and their scales, arrive.
  __device__ void init_full(int i) const { ptx::mbarrier_init(full() + 8 * i, 2); }
};

// Where a cursor's tile is.
template <typename Cursor, typename Element, typename S>
struct DecodeTileOf {
  const DecodeParams<Element>& p;

  // Row tile by row tile of the first token tile, then of the next. Where there is one, nothing is
  // divided, since that would hold up the first copies.
  __device__ int row_block() const {  // of 64 rows: the first
    return (one_token_tile() ? tile() : tile() % p.row_tiles) * S::kRowTiles;
  }
  __device__ int row() const { return static_cast<const Cursor*>(this)->row_block() * 64; }
  __device__ int token() const { return one_token_tile() ? 0 : tile() / p.row_tiles * S::kTokens; }
  // What the tile holds: the last of several begins early enough to be full, and does some tokens that
  // the one before it stores.
  __device__ int first_token() const {
    return one_token_tile() ? 0 : min(token(), p.m - S::kTokens);
  }
  __device__ bool one_token_tile() const { return !S::kTile.many_tokens() || p.token_tiles == 1; }

 private:
  __device__ int tile() const { return static_cast<const Cursor*>(this)->tile(); }
};

// A block's tiles, in turn: half a tile and the tile that its pair shares, of which it does its half of k, then
// the others.
template <typename Element, typename S>
struct DecodePairCursor : DecodeTileOf<DecodePairCursor<Element, S>, Element, S> {
  using Base = DecodeTileOf<DecodePairCursor<Element, S>, Element, S>;
  using Base::p;
  plan::DecodeShare share;
  int at;  // -2: half a tile; -1: the shared tile

  __device__ explicit DecodePairCursor(const DecodeParams<Element>& params)
      : Base{params},
        share(plan::DecodeShare::of(params.deal, static_cast<int>(blockIdx.x))),
        at(S::kCutsTiles && share.half >= 0 ? -2 : after_half()) {}
  __device__ bool valid() const { return at < share.whole; }
  __device__ bool last() const { return next() == share.whole; }
  __device__ void advance() { at = next(); }
  __device__ bool half() const { return S::kCutsTiles && at == -2; }
  __device__ bool shared() const { return at < 0; }
  // Whether another tile that the pair shares comes after this one, or came before it.
  __device__ bool shares_next() const { return half() && share.shared >= 0; }
  __device__ bool shared_before() const { return S::kCutsTiles && at == -1 && share.half >= 0; }
  __device__ int row_block() const { return half() ? share.half : Base::row_block(); }
  __device__ int row_blocks() const { return half() ? 1 : S::kRowTiles; }
  // Whether the consumers store the tile: nobody else does, or nothing else is left to do.
  __device__ bool consumers_store() const { return !S::kHasFinisher || last(); }
  __device__ int tile() const { return shared() ? share.shared : share.first + at; }
  __device__ int first_stage() const { return shared() ? share.first_shared_stage(p.stages) : 0; }
  __device__ int stages() const { return shared() ? share.shared_stages(p.stages) : p.stages; }

 private:
  __device__ int after_half() const { return share.shared < 0 ? 0 : -1; }
  __device__ int next() const { return half() ? after_half() : at + 1; }
};

// A block's tiles, in turn, where any blocks share them over memory: from the last to the first.
template <typename Element, typename S>
struct DecodeRunCursor : DecodeTileOf<DecodeRunCursor<Element, S>, Element, S> {
  using Base = DecodeTileOf<DecodeRunCursor<Element, S>, Element, S>;
  using Base::p;
  plan::StageRun run;
  int at;  // tiles before it

  __device__ explicit DecodeRunCursor(const DecodeParams<Element>& params)
      : Base{params}, run(plan::StageRun::of(params.runs, block())), at(0) {}
  __device__ static int block() { return static_cast<int>(blockIdx.x); }
  __device__ bool valid() const { return at < run.tiles; }
  __device__ bool last() const { return at + 1 == run.tiles; }
  __device__ void advance() { ++at; }
  __device__ bool half() const { return false; }
  __device__ int row_blocks() const { return S::kRowTiles; }
  __device__ int tile() const { return run.last - at; }
  __device__ int first_stage() const { return run.first_stage(tile(), p.stages); }
  __device__ int stages() const { return run.end_stage(tile(), p.stages) - first_stage(); }

  // Whether another block stores the tile, with what this one leaves; or else this one, with what the blocks
  // from the first sender to the one before this have left.
  __device__ bool sends() const { return run.end_stage(tile(), p.stages) < p.stages; }
  __device__ bool gathers() const { return first_stage() > 0 && !sends(); }
  __device__ int first_sender() const { return p.runs.first_sender(block(), tile()); }
  // Whether the consumers store the tile: nothing is left to do, or so little that the finisher warp
  // would hold it up.
  __device__ bool consumers_store() const {
    const int next = tile() - 1;
    return last() || p.stages - run.first_stage(next, p.stages) < S::kTile.stages_to_store();
  }
};

template <typename Element, typename S>
using DecodeCursor =
    std::conditional_t<S::kRuns, DecodeRunCursor<Element, S>, DecodePairCursor<Element, S>>;

}  // namespace marlin::cuda::sm90
