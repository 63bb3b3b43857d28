// The producer warpgroup of a prefill kernel (prefill.cuh): fills the ring of stages.
#pragma once

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sm90/prefill_tiles.cuh"
#include "cuda/sm90/ring.cuh"

namespace marlin::cuda::sm90 {

// Three warps, so that none waits for another's copies to be issued: for weights, for activations, and for scales
// and zero points; a fourth flags sums that its block leaves for others. What does not change within a tile is
// computed once: the ring is filled no faster than the longest of these loops runs, and with divisions in them
// that was half the speed.
template <typename Element, typename S>
struct PrefillProducer {
  using Cursor = PrefillCursor<Element, S>;
  static constexpr int kArrivals = 3;  // on the barrier of a full stage

  const PrefillParams<Element>& p;
  uint32_t shared;
  RingProducer<S::kStages> ring;

  __device__ void run(int warp) {
    if (warp == 1 || !p.static_weights) ptx::wait_for_earlier_kernels();
#pragma unroll 1
    for (Cursor tile(p); tile.valid(); tile.advance()) {
      if (warp == 0) copy_weights(tile);
      if (warp == 1) copy_input(tile);
      if (warp == 2) copy_scales(tile);
      if (warp == 3 && tile.sends()) raise_flags(tile);
    }
  }

  __device__ void copy_weights(const Cursor& tile) {
    const int pieces = tile.pieces(), first_block = tile.first_stage() * S::kStageBlocks;
    const int32_t* from =
        p.qweight + layout::word_index(tile.row_block(), first_block, p.k_blocks, 0, 0);
    const int64_t to_next_row_block = int64_t{p.k_blocks} * layout::kWordsPerBlock;
    [[maybe_unused]] const int32_t* meta =
        p.meta +
        (int64_t{tile.row_block()} * p.k_blocks + first_block) * layout::kMetaWordsPerBlock;
    [[maybe_unused]] const int64_t to_next_meta = int64_t{p.k_blocks} * layout::kMetaWordsPerBlock;
    int blocks = min(tile.stages() * S::kStageBlocks, p.k_blocks - first_block);
#pragma unroll 1
    for (; blocks > 0; blocks -= S::kStageBlocks) {
      ring.fill([&](int slot, uint32_t barrier) {
        const uint32_t stage = shared + slot * S::kStageBytes;
        const int count = min(S::kStageBlocks, blocks);
        const int bytes = count * layout::kBytesPerBlock;
        const int meta_bytes = S::kSparse ? count * layout::kMetaBytesPerBlock : 0;
        ptx::mbarrier_arrive_expect(barrier, pieces * (bytes + meta_bytes));
#pragma unroll
        for (int r = 0; r < S::kRowBlocks; ++r) {
          if (r < pieces) {
            ptx::bulk_copy(stage + S::kWeightsAt + r * S::kRowBlockBytes,
                           from + r * to_next_row_block, bytes, barrier);
            if constexpr (S::kSparse) {
              ptx::bulk_copy(stage + S::kMetaAt + r * S::kMetaBytes, meta + r * to_next_meta,
                             meta_bytes, barrier);
            }
          }
        }
      });
      from += S::kStageBlocks * layout::kWordsPerBlock;
      meta += S::kStageBlocks * layout::kMetaWordsPerBlock;
    }
  }

  __device__ void copy_input(const Cursor& tile) {
    const int bytes = p.input_tokens * S::kTile.stage_k() * 2, token = tile.first_token();
    constexpr int kBlocks = S::kTile.stage_k() / 64;
    int block = tile.first_stage() * kBlocks;
    const int last = block + tile.stages() * kBlocks;
#pragma unroll 1
    for (; block < last; block += kBlocks) {
      ring.fill([&](int slot, uint32_t barrier) {
        ptx::mbarrier_arrive_expect(barrier, bytes);
        ptx::tensor_copy(shared + slot * S::kStageBytes + S::kInputAt, p.input, 0, token, block,
                         barrier);
      });
    }
  }

  // Once the consumers have left their sums for another block.
  __device__ void raise_flags(const Cursor& tile) const {
    ptx::barrier_sync<S::kSumsLeft, S::kConsumers + 32>();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < tile.pieces()) flag_sums(PrefillPartials<Element, S>{p}.flag(tile.block(), lane));
    __syncwarp();
  }

  // A group longer than a stage has one row of scales, which is copied for every stage.
  __device__ void copy_scales(const Cursor& tile) {
    const int row = tile.row_block() * layout::kBlock;
    const int groups = p.one_group ? 1 : max(S::kTile.stage_k() >> p.period_log2, 1);
    const int bytes = S::kRows * groups * (p.has_zeros ? 3 : 2);
    const int step = p.one_group ? 0 : S::kTile.stage_k();
    int column = tile.first_stage() * step;
#pragma unroll 1
    for (int i = tile.stages(); i > 0; --i) {
      ring.fill([&](int slot, uint32_t barrier) {
        const uint32_t stage = shared + slot * S::kStageBytes;
        const int group = column >> p.period_log2;
        ptx::mbarrier_arrive_expect(barrier, bytes);
        ptx::tensor_copy(stage + S::kScalesAt, p.scales, row, group, barrier);
        if (p.has_zeros) ptx::tensor_copy(stage + S::kZerosAt, p.zeros, row, group, barrier);
      });
      column += step;
    }
  }
};

}  // namespace marlin::cuda::sm90
