// Which stages and rows are a consumer warpgroup's, in a decode kernel (decode.cuh).
#pragma once

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/decode_tiles.cuh"
#include "cuda/sm90/ring.cuh"

namespace marlin::cuda::sm90 {

// What the inner loop needs is kept, the rest computed where it is needed: registers are short.
// Addresses of shared memory, since arithmetic on pointers would be done anew for every stage.
template <typename S>
struct DecodePlace {
  uint32_t base;                 // of shared memory
  int row_tile, split;           // which warpgroup
  uint32_t words_at, scales_at;  // this thread's weights and scales in the first stage
  uint32_t meta_at;              // and metadata, of sparse weights
  static constexpr int kRingUnit = S::kPlainLoop ? 8 : 1;
  RingConsumer<S::kStages, S::kSplits, kRingUnit> ring;
  RingConsumer<S::kInputStages, S::kSplits, kRingUnit> input_ring;

  __device__ explicit DecodePlace(uint32_t shared) : ring(0, 0), input_ring(0, 0) {
    // By shuffles, so that the compiler knows them to be the same in the whole warp: descriptors then
    // live in uniform registers, and no `R2UR` stands before every wgmma.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    base = __shfl_sync(0xffffffffu, shared, 0);
    row_tile = warpgroup % S::kRowTiles;
    split = warpgroup / S::kRowTiles;
    ring = {barriers().full(), split};
    input_ring = {barriers().input_full(), split};
    words_at = base + S::kWeightsAt + row_tile * S::kRowTileBytes + thread() * 16;
    scales_at = base + S::kScalesAt + row() * 2;
    meta_at = base + S::kWeightsAt + row_tile * S::kRowTileBytes + S::kMetaAt + thread() * 8;
  }

  __device__ DecodeBarriers<S> barriers() const { return {base + S::kBarriersAt}; }
  __device__ static int thread() { return static_cast<int>(threadIdx.x) % 128; }
  // Of a tile; the other of this thread's two rows is 8 further on.
  __device__ int row() const { return row_tile * 64 + thread() / 32 * 16 + thread() % 32 / 4; }

  // In the current stage.
  __device__ uint64_t input_descriptor() const {
    return ptx::wgmma_descriptor_of(ptx::wgmma_descriptor_low(base) +
                                    input_ring.template offset<S::kInputBytes>() / 16);
  }
  __device__ uint4 words(int block) const {
    return ptx::load_shared<uint4>(words_at + ring.template offset<S::kWeightBytes>() +
                                   block * layout::kBytesPerBlock);
  }
  __device__ uint2 meta(int block) const {
    return load_meta(meta_at + ring.template offset<S::kWeightBytes>() + block * S::kMetaBytes);
  }
  __device__ uint32_t scales(int group) const {
    return scales_at + ring.template offset<S::kScaleBytes>() + group * S::kRows * 2;
  }
  __device__ uint32_t zeros(int group) const {
    return base + S::kZerosAt + row() + ring.template offset<S::kZeroBytes>() + group * S::kRows;
  }

  // This split's next stage.
  __device__ void wait() const {
    wait_for_weights();
    wait_for_input();
  }
  __device__ void wait_for_weights() const { ring.wait(); }
  __device__ void wait_for_input() const { input_ring.wait(); }
  __device__ void advance() {
    ring.advance();
    input_ring.advance();
  }
  // Of the current stage; given back now, or once what is under way has read it.
  struct Held {
    uint32_t weights, input;
  };
  __device__ Held hold() const { return {ring.empty(), input_ring.empty()}; }
  __device__ static void release(const Held& held) {
    ptx::mbarrier_arrive(held.weights);
    ptx::mbarrier_arrive(held.input);
  }
  __device__ void release() const { release(hold()); }
};

}  // namespace marlin::cuda::sm90
