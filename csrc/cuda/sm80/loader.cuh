// The copying half of the sm80 GEMM: units of work into the stages of the pipeline.
#pragma once

#include "cuda/ptx/cp_async.cuh"
#include "cuda/sm80/params.cuh"
#include "layout/packed.h"
#include "layout/sparse.h"

namespace marlin::cuda::sm80 {

// Copies units into stages. Every thread keeps the addresses of what it copies next.
template <typename Element, typename S>
struct Loader {
  static constexpr plan::Tile kTile = S::kTile;
  static constexpr int kThreads = kTile.threads(), kRows = kTile.rows();
  static constexpr int kInputPitch = kTile.stage_k() * 2;  // bytes of a token in a stage
  static constexpr int kChunks = kTile.stage_k() / 8;      // 16-byte chunks of it
  static constexpr int kTokenStep = kThreads / kChunks;    // tokens that all threads copy at once
  static constexpr int kSplitBlocks = kTile.blocks() / kTile.warps_k;  // that 128 threads multiply
  static constexpr int kMetaAt = kTile.weight_bytes();                 // offsets inside a stage
  static constexpr int kInputAt = kMetaAt + kTile.meta_bytes();
  static constexpr int kScalesAt = kInputAt + kTile.input_bytes();
  static constexpr int kZerosAt = kScalesAt + kTile.scale_bytes();
  static_assert(kTile.block_k() == (kTile.sparse ? layout::kSparseColumns : layout::kBlock));
  static_assert(kMetaAt == kTile.blocks() * layout::kBytesPerBlock);
  static_assert(!kTile.sparse || kTile.meta_bytes() == kTile.blocks() * layout::kMetaBytesPerBlock);
  static_assert(kThreads % kChunks == 0);
  static_assert(kTile.scale_rows() * kRows / 8 <= kThreads);  // one copy per thread does the scales

  const Params<Element>& p;
  Unit unit;
  int remaining;  // units of this block not yet asked for
  const int32_t* weights;
  const int32_t* meta;  // of a sparse weight
  const Element* input;
  int k_blocks_left;  // from this thread's first block of the unit on
  int columns_left;   // from this thread's chunk of the unit on
  int tokens_left;    // from this thread's first token on

  // A copy that is not `valid` reads nothing and writes zeros, so its address may lie anywhere.

  __device__ Loader(const Params<Element>& params, int64_t begin, int64_t end)
      : p(params), unit(params.partition, begin), remaining(static_cast<int>(end - begin)) {
    enter_tile();
  }

  // Every thread copies exactly the 16-byte cells that it will convert itself.
  __device__ void enter_tile() {
    const int thread = static_cast<int>(threadIdx.x), split = thread / layout::kThreads;
    const int k_block = (unit.stage_of_tile * kTile.warps_k + split) * kTile.k_blocks;
    const int token = unit.token_tile * kTile.tokens + thread / kChunks;
    const int column = unit.stage_of_tile * kTile.stage_k() + thread % kChunks * 8;
    weights = p.qweight + layout::word_index(unit.row_tile * kTile.row_blocks, k_block, p.k_blocks,
                                             thread % layout::kThreads, 0);
    if constexpr (kTile.sparse) {
      const int n_block = unit.row_tile * kTile.row_blocks + first_meta_block() % kTile.row_blocks;
      meta = p.meta + layout::meta_index(n_block, k_block + first_meta_block() / kTile.row_blocks,
                                         p.k_blocks, thread % kMetaThreads * 2, 0);
    }
    input = p.input + token * p.input_stride + column;
    k_blocks_left = p.k_blocks - k_block;
    columns_left = p.k - column;
    tokens_left = p.m - token;
  }

  __device__ void advance() {
    --remaining;
    if (unit.ends_tile(p.partition)) {
      unit.advance(p.partition);
      enter_tile();
    } else {
      ++unit.stage_of_tile;
      weights += kTile.warps_k * kTile.k_blocks * layout::kWordsPerBlock;
      if constexpr (kTile.sparse) {
        meta += kTile.warps_k * kTile.k_blocks * layout::kMetaWordsPerBlock;
      }
      input += kTile.stage_k();
      k_blocks_left -= kTile.warps_k * kTile.k_blocks;
      columns_left -= kTile.stage_k();
    }
  }

  __device__ void load(uint32_t stage) {
    if (remaining > 0) {
      load_weights(stage);
      if constexpr (kTile.sparse) load_meta(stage + kMetaAt);
      load_input(stage + kInputAt);
      load_per_group(p.scales, stage + kScalesAt);
      if (p.zeros) load_per_group(p.zeros, stage + kZerosAt);
      advance();
    }
    ptx::cp_async_commit();  // an empty group where nothing is left, so that waits stay uniform
  }

  // Cells in a stage: [split][k block][row block][thread].
  __device__ void load_weights(uint32_t stage) const {
    const int thread = static_cast<int>(threadIdx.x), split = thread / layout::kThreads;
    const uint32_t first =
        stage + split * (kSplitBlocks * layout::kBytesPerBlock) + thread % layout::kThreads * 16;
#pragma unroll
    for (int block = 0; block < kTile.k_blocks; ++block) {
#pragma unroll
      for (int r = 0; r < kTile.row_blocks; ++r) {
        const bool valid =
            block < k_blocks_left && (r == 0 || unit.row_tile * kTile.row_blocks + r < p.n_blocks);
        ptx::cp_async_16(first + (block * kTile.row_blocks + r) * layout::kBytesPerBlock,
                         weights + (int64_t{r} * p.k_blocks + block) * layout::kWordsPerBlock,
                         valid);
      }
    }
  }

  // 64 threads copy the metadata of a block, 16 bytes each: the 128 of a split do two blocks at once.
  static constexpr int kMetaThreads = layout::kMetaBytesPerBlock / 16;

  __device__ int first_meta_block() const {
    return static_cast<int>(threadIdx.x) / kMetaThreads % 2;
  }

  // Zeros would not do where there is no block: they are places that the instruction must not be given.
  // So it gets those of another block there, for weights that meet no activation or make no output.
  __device__ void load_meta(uint32_t stage) const {
    static_assert(kTile.row_blocks <= 2 && (kSplitBlocks == 1 || kSplitBlocks % 2 == 0));
    const int thread = static_cast<int>(threadIdx.x), split = thread / layout::kThreads;
    const uint32_t first = stage + split * (kSplitBlocks * layout::kMetaBytesPerBlock) +
                           thread % layout::kThreads * 16;
#pragma unroll
    for (int i = 0; i < kSplitBlocks; i += 2) {
      const int at = i + first_meta_block(), block = at / kTile.row_blocks;
      if (kSplitBlocks == 1 && at > 0) break;
      const bool valid = block < k_blocks_left &&
                         unit.row_tile * kTile.row_blocks + at % kTile.row_blocks < p.n_blocks;
      const int32_t* source = meta + i / kTile.row_blocks * layout::kMetaWordsPerBlock;
      ptx::cp_async_16(first + i * layout::kMetaBytesPerBlock, valid ? source : p.meta, true);
    }
  }

  // Chunk c of token t lies at chunk c ^ (t % 8), so that the eight rows that ldmatrix reads at
  // once are in different banks.
  __device__ void load_input(uint32_t stage) const {
    const int thread = static_cast<int>(threadIdx.x), c = thread % kChunks;
#pragma unroll
    for (int step = 0; step < kTile.tokens; step += kTokenStep) {
      const int t = step + thread / kChunks;
      if (kTokenStep > kTile.tokens && t >= kTile.tokens) break;
      const bool valid = columns_left > 0 && step < tokens_left;
      ptx::cp_async_16(stage + t * kInputPitch + (c ^ (t % 8)) * 16, input + step * p.input_stride,
                       valid);
    }
  }

  // Row i of a stage's scales is for its columns i * 2^scale_shift and on.
  template <typename Value>
  __device__ void load_per_group(const Value* source, uint32_t to) const {
    constexpr int kPerChunk = 16 / sizeof(Value), kChunksPerRow = kRows / kPerChunk;
    const int thread = static_cast<int>(threadIdx.x), i = thread / kChunksPerRow;
    if (i >= kTile.stage_k() >> p.scale_shift) return;
    const int column = unit.stage_of_tile * kTile.stage_k() + (i << p.scale_shift);
    const int group = min(column >> p.group_shift, p.groups - 1);
    const int row = unit.row_tile * kRows + thread % kChunksPerRow * kPerChunk;
    ptx::cp_async_16(to + thread * 16, source + int64_t{group} * p.scale_stride + row,
                     row < p.scale_stride);
  }
};

}  // namespace marlin::cuda::sm80
