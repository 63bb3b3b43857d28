// The producer warps of a decode kernel (decode.cuh): they fill the two rings.
#pragma once

#include "cuda/sm90/decode_tiles.cuh"
#include "cuda/sm90/ring.cuh"

namespace marlin::cuda::sm90 {

// Three warps, so that none waits for another's copies to be issued. What does not change within a tile
// is computed once: the ring is filled no faster than the longest of these loops runs.
template <typename Element, typename S>
struct DecodeProducer {
  using Cursor = DecodeCursor<Element, S>;

  const DecodeParams<Element>& p;
  uint32_t shared;
  DecodeBarriers<S> barriers;

  // A tile's weights that are still to be copied.
  struct Weights {
    const int32_t *from, *meta;
    int64_t to_next_row_block, to_next_meta;
    int row_blocks, blocks;  // of 64 rows, and of a row block

    __device__ Weights(const DecodeParams<Element>& p, const Cursor& work) {
      const int row_block = work.row_block();
      const int first_block = work.first_stage() * S::kStageBlocks;
      from = p.qweight + layout::word_index(row_block, first_block, p.k_blocks, 0, 0);
      meta = p.meta + (int64_t{row_block} * p.k_blocks + first_block) * layout::kMetaWordsPerBlock;
      to_next_row_block = int64_t{p.k_blocks} * layout::kWordsPerBlock;
      to_next_meta = int64_t{p.k_blocks} * layout::kMetaWordsPerBlock;
      row_blocks = min(work.row_blocks(), p.n_blocks - row_block);
      blocks = min(work.stages() * S::kStageBlocks, p.k_blocks - first_block);
    }

    __device__ bool valid() const { return blocks > 0; }
    __device__ void advance(int stages = 1) {
      from += stages * S::kStageBlocks * layout::kWordsPerBlock;
      meta += stages * S::kStageBlocks * layout::kMetaWordsPerBlock;
      blocks -= stages * S::kStageBlocks;
    }

    // The next stage. By one thread.
    __device__ void copy(uint32_t to, uint32_t barrier) const {
      const int count = min(S::kStageBlocks, blocks);
      const int bytes = count * layout::kBytesPerBlock;
      ptx::mbarrier_arrive_expect(barrier, row_blocks * bytes + S::kStageMetaBytes);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        if (r < row_blocks) {
          ptx::bulk_copy(to + r * S::kRowTileBytes, from + r * to_next_row_block, bytes, barrier);
        }
        if constexpr (S::kSparse) {
          copy_meta(to + r * S::kRowTileBytes + S::kMetaAt,
                    meta + min(r, row_blocks - 1) * to_next_meta, count, barrier);
        }
      }
    }
  };

  // Before anything else is done in the block: the first stages, which wait for nothing but their own
  // barriers. From the start of a block to its first copy it is 2000 cycles otherwise. (H200)
  __device__ void start_weights() const {
    const Cursor work(p);
    Weights weights(p, work);
#pragma unroll 1
    for (int i = 0; i < started(work); ++i) {
      weights.copy(shared + S::kWeightsAt + i * S::kWeightBytes, barriers.full() + 8 * i);
      weights.advance();
    }
  }

  __device__ int started(const Cursor& work) const {
    const int most = min(p.first_stages, S::kFirstStages);
    return p.static_weights && work.valid() ? min(most, work.stages()) : 0;
  }

  // All others.
  __device__ void copy_weights() const {
    Cursor work(p);
    const int first = started(work);
    RingProducer<S::kStages> ring{barriers.full(), barriers.empty(), first};
    int early = p.static_weights ? p.early_stages - first : 0;
    int done = first;  // of the tile
#pragma unroll 1
    for (; work.valid(); work.advance(), done = 0) {
      Weights weights(p, work);
      weights.advance(done);
#pragma unroll 1
      for (; weights.valid(); weights.advance()) {
        if (early-- == 0) ptx::wait_for_earlier_kernels();
        ring.fill([&](int slot, uint32_t barrier) {
          weights.copy(shared + S::kWeightsAt + slot * S::kWeightBytes, barrier);
        });
      }
    }
  }

  // Of a row tile's stage that has `count` blocks. Where there is none, another's: what it picks from
  // are zeros, or sums that nobody stores, but places that do not rise must not be given to wgmma.
  __device__ static void copy_meta(uint32_t to, const int32_t* from, int count, uint32_t barrier) {
    ptx::bulk_copy(to, from, count * S::kMetaBytes, barrier);
#pragma unroll 1
    for (int i = count; i < S::kStageBlocks; ++i) {
      ptx::bulk_copy(to + i * S::kMetaBytes, from, S::kMetaBytes, barrier);
    }
  }

  __device__ void copy_input() const {
    RingProducer<S::kInputStages> ring{barriers.input_full(), barriers.input_empty()};
    Cursor work(p);
    const int bytes = p.input_tokens * S::kTile.stage_k() * 2;
    ptx::wait_for_earlier_kernels();
    if (!p.static_weights) ptx::let_next_kernel_start();
#pragma unroll 1
    for (; work.valid(); work.advance()) {
      constexpr int kBoxes = S::kTile.stage_k() / 64;
      int box = work.first_stage() * kBoxes;
      const int token = work.first_token();
#pragma unroll 1
      for (int i = work.stages(); i > 0; --i) {
        ring.fill([&](int slot, uint32_t barrier) {
          ptx::mbarrier_arrive_expect(barrier, bytes);
          ptx::tensor_copy(shared + slot * S::kInputBytes, p.input, 0, token, box, barrier);
        });
        box += kBoxes;
      }
    }
  }

  // A layer with one group has one row of scales, which is copied for every stage.
  __device__ void copy_scales() const {
    RingProducer<S::kStages> ring{barriers.full(), barriers.empty()};
    if (!p.static_weights) ptx::wait_for_earlier_kernels();
    const int groups = p.one_group ? 1 : S::kGroups;
    const int bytes = S::kRows * groups * (p.has_zeros ? 3 : 2);
#pragma unroll 1
    for (Cursor work(p); work.valid(); work.advance()) {
      const int row = work.row();
      const int first = work.first_stage(), end = first + work.stages();
#pragma unroll 1
      for (int stage = first; stage < end; ++stage) {
        const int group = p.one_group ? 0 : stage * S::kTile.stage_k() / S::kPeriod;
        ring.fill([&](int slot, uint32_t barrier) {
          ptx::mbarrier_arrive_expect(barrier, bytes);
          ptx::tensor_copy(shared + S::kScalesAt + slot * S::kScaleBytes, p.scales, row, group,
                           barrier);
          if (p.has_zeros) {
            ptx::tensor_copy(shared + S::kZerosAt + slot * S::kZeroBytes, p.zeros, row, group,
                             barrier);
          }
        });
      }
    }
  }
};

}  // namespace marlin::cuda::sm90
