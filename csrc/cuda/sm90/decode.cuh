// The GEMM for few tokens on Hopper: `wgmma` with the weights as register operand A.
//
// It computes, for 64 * kRowTiles output features and up to kTokens tokens,
//     sums[row, token] = sum over groups of scale[row, group] * sum_k (q - zero)[row, k] x[token, k]
//
// Roles: two producer warps fill a ring of stages by bulk copies, one with the weights as they lie,
// scales and zero points, the other with activations; kRowTiles * kSplits consumer warpgroups convert
// and multiply. Stage i belongs to split i % kSplits. The splits' sums are added in a fixed order,
// through shared memory, and across the blocks of a cluster where k is split among blocks too.
//
// Programmatic dependent launch: with `static_weights` the producer fills the ring with weights while
// the previous kernel still runs; activations are read, and outputs written, only after it has
// finished. Without it, nothing is read before the wait, and the next kernel is let go only after it,
// so that a promise made by the next call cannot reach past a kernel that this one waits for.
#pragma once

#include "cuda/element.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/layer.h"
#include "layout/packed.h"
#include "plan/decode.h"

namespace marlin::cuda::sm90 {

template <typename Element>
struct DecodeParams : LayerParams<Element> {
  int row_tiles, stages_per_block;  // stages of a tile that one block of a cluster does
  int cluster;                      // blocks that share a tile's k; then a block does one tile
};

template <int kTokens_, int kRowTiles_, int kSplits_, int kStageBlocks_, int kPeriod_>
struct DecodeShape {
  static constexpr plan::DecodeTile kTile{kTokens_, kRowTiles_, kSplits_, kStageBlocks_};
  static constexpr int kTokens = kTokens_, kRowTiles = kRowTiles_, kSplits = kSplits_;
  static constexpr int kStageBlocks = kStageBlocks_;
  static constexpr int kPeriod = kPeriod_;  // columns between scales
  static constexpr int kStages = kTile.stages(kPeriod);
  static constexpr int kGroups = kTile.stage_k() / kPeriod;  // rows of scales in a stage
  static constexpr int kRows = kTile.rows(), kConsumers = kTile.consumers();
  static constexpr int kRowTileBytes = kStageBlocks * layout::kBytesPerBlock;
  static constexpr int kInputAt = 0, kWeightsAt = kTile.input_bytes();
  static constexpr int kScalesAt = kTile.scales_at(), kZerosAt = kTile.zeros_at(kPeriod);
  static constexpr int kStageBytes = kTile.stage_bytes(kPeriod);
  static constexpr int kSumStride = kTile.sum_stride(), kSumsAt = kTile.sums_at(kPeriod);
  static constexpr int kBarriersAt = kTile.barriers_at(kPeriod);
  static_assert(kStages > 0 && kStages % kSplits == 0);
};

// A tile's part of k, stage by stage, then the block's next tile.
template <typename Element, typename S>
struct StageCursor {
  int row_tile, stage, first, last;

  __device__ StageCursor(const DecodeParams<Element>& p)
      : row_tile(static_cast<int>(blockIdx.x) / p.cluster) {
    const int rank = static_cast<int>(blockIdx.x) % p.cluster;
    const int stages = (p.k_blocks + S::kStageBlocks - 1) / S::kStageBlocks;
    first = min(rank * p.stages_per_block, stages);
    last = min(first + p.stages_per_block, stages);
    stage = first;
  }
  __device__ bool valid(const DecodeParams<Element>& p) const {
    return row_tile < p.row_tiles && stage < last;
  }
  __device__ void advance(const DecodeParams<Element>& p) {
    if (++stage < last) return;
    stage = first;
    row_tile += p.cluster > 1 ? p.row_tiles : static_cast<int>(gridDim.x);
  }
};

// Two warps: one asks for weights, scales and zero points, the other for activations. A warp stays
// together and elects the thread that copies, so that the compiler keeps addresses in uniform
// registers, as copies want them.
template <typename Element, typename S>
struct Producer {
  using Cursor = StageCursor<Element, S>;

  const DecodeParams<Element>& p;
  uint32_t shared, full, empty;

  __device__ void wait_for_slot(int count) const {
    if (count < S::kStages) return;
    ptx::mbarrier_wait(empty + 8 * (count % S::kStages), (count / S::kStages - 1) & 1);
  }

  __device__ void produce_weights() const {
    if (!p.static_weights) ptx::wait_for_earlier_kernels();
    int count = 0;
    for (Cursor cursor(p); cursor.valid(p); cursor.advance(p), ++count) {
      wait_for_slot(count);
      if (ptx::elect_one()) copy_weights(cursor, count % S::kStages);
      __syncwarp();
    }
  }

  __device__ void produce_input() const {
    ptx::wait_for_earlier_kernels();
    int count = 0;
    for (Cursor cursor(p); cursor.valid(p); cursor.advance(p), ++count) {
      wait_for_slot(count);
      const int slot = count % S::kStages;
      if (ptx::elect_one()) {
        ptx::tensor_copy(shared + slot * S::kStageBytes + S::kInputAt, p.input, 0, 0,
                         cursor.stage * S::kStageBlocks, full + 8 * slot);
      }
      __syncwarp();
    }
  }

  // Everything of a stage but its activations, which the barrier is told to expect too.
  __device__ void copy_weights(const Cursor& at, int slot) const {
    const uint32_t stage = shared + slot * S::kStageBytes, barrier = full + 8 * slot;
    const int k_block = at.stage * S::kStageBlocks;
    const int bytes = min(S::kStageBlocks, p.k_blocks - k_block) * layout::kBytesPerBlock;
    const int first_row_block = at.row_tile * S::kRowTiles;
    const int row_blocks = min(S::kRowTiles, p.n_blocks - first_row_block);
    // A layer with one group has one row of scales, which is copied for every stage.
    const int group = p.one_group ? 0 : at.stage * S::kGroups,
              groups = p.one_group ? 1 : S::kGroups;
    ptx::mbarrier_arrive_expect(barrier, S::kTile.input_bytes() + row_blocks * bytes +
                                             S::kRows * groups * (p.has_zeros ? 3 : 2));
    for (int r = 0; r < row_blocks; ++r) {
      const int64_t from = layout::word_index(first_row_block + r, k_block, p.k_blocks, 0, 0);
      ptx::bulk_copy(stage + S::kWeightsAt + r * S::kRowTileBytes, p.qweight + from, bytes,
                     barrier);
    }
    const int row = at.row_tile * S::kRows;
    ptx::tensor_copy(stage + S::kScalesAt, p.scales, row, group, barrier);
    if (p.has_zeros) ptx::tensor_copy(stage + S::kZerosAt, p.zeros, row, group, barrier);
  }
};

template <typename Element, typename S>
struct Consumer {
  using Format = typename ElementTraits<Element>::Format;
  static constexpr int kTokens = S::kTokens;

  const DecodeParams<Element>& p;
  const char* shared;
  uint32_t full, empty;
  uint64_t descriptor;          // of the first stage's activations
  int thread, row_tile, split;  // in the warpgroup; which warpgroup
  float sums[kTokens / 2] = {};

  __device__ Consumer(const DecodeParams<Element>& params, char* shared_memory, uint32_t full_,
                      uint32_t empty_)
      : p(params),
        shared(shared_memory),
        full(full_),
        empty(empty_),
        thread(static_cast<int>(threadIdx.x) % 128) {
    // By shuffles, so that the compiler knows them to be the same in the whole warp: descriptors
    // then live in uniform registers, and no `R2UR` stands before every wgmma.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    const uint32_t base = __shfl_sync(0xffffffffu, ptx::shared_address(shared_memory), 0);
    row_tile = warpgroup % S::kRowTiles;
    split = warpgroup / S::kRowTiles;
    descriptor = ptx::wgmma_descriptor(base + S::kInputAt);
  }

  // One stage.
  __device__ void multiply(int slot) {
    const char* stage = shared + slot * S::kStageBytes;
    const auto* words = reinterpret_cast<const uint4*>(stage + S::kWeightsAt +
                                                       row_tile * S::kRowTileBytes + thread * 16);
    const uint64_t b = descriptor + static_cast<uint64_t>(__shfl_sync(0xffffffffu, slot, 0) *
                                                          (S::kStageBytes / 16));
#pragma unroll
    for (int half = 0; half < S::kStageBlocks / 2; ++half) {  // 128 columns
      const uint4 q0 = words[half * 256], q1 = words[half * 256 + 128];
      const uint32_t word[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
      for (int first = 0; first < 8; first += S::kPeriod / 16) {
        multiply_group(word, b, stage, half, first);
      }
    }
  }

  // The kPeriod columns from k16 step `first` of a half on: they have one scale per row.
  __device__ void multiply_group(const uint32_t (&word)[8], uint64_t b, const char* stage, int half,
                                 int first) {
    constexpr int kSteps = S::kPeriod / 16, kBatch = kSteps < 4 ? kSteps : 4;
    const int group = p.one_group ? 0 : (half * 128 + first * 16) / S::kPeriod;
    const int row = group * S::kRows + row_tile * 64 + thread / 32 * 16 + thread % 32 / 4;
    const auto* scales = reinterpret_cast<const Element*>(stage + S::kScalesAt) + row;
    const auto* zeros = reinterpret_cast<const uint8_t*>(stage + S::kZerosAt) + row;
    const float scale[2] = {to_float(scales[0]), to_float(scales[8])};
    const uint32_t subtrahend[2] = {
        layout::subtrahend<Format>(p.has_zeros ? zeros[0] : layout::kSymmetricZero, 0),
        layout::subtrahend<Format>(p.has_zeros ? zeros[8] : layout::kSymmetricZero, 1)};
    float partial[kTokens / 2];
    uint32_t a[kSteps][4];
#pragma unroll
    for (int batch = 0; batch < kSteps; batch += kBatch) {
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i)
        convert<Element>(a[i], word[first + i], subtrahend);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {
        const int step = half * 8 + first + i;  // 16 columns each; 4 of them lie in 128 bytes
        ptx::wgmma_m64k16<Element, kTokens>(
            partial, a[i], b + static_cast<uint64_t>(step / 4 * kTokens * 8 + step % 4 * 2), i > 0);
      }
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      asm volatile("" : "+f"(partial[i])::"memory");  // not read before the wait
      sums[i] = fmaf(partial[i], scale[i / 2 % 2], sums[i]);
    }
  }

  // Leaves the sums as [split][token][row] and clears them.
  __device__ void leave_sums(float* buffer) {
    const int row = row_tile * 64 + thread / 32 * 16 + thread % 32 / 4;
    float* at = buffer + split * kTokens * S::kSumStride + row;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + thread % 4 * 2 + i % 2;
      at[token * S::kSumStride + i / 2 % 2 * 8] = sums[i];
      sums[i] = 0.f;
    }
  }
};

// Adds the splits of all blocks of the cluster, in the order of rank and split, and stores this
// block's share of the tile's rows. Threads 0 .. kConsumers - 1.
template <typename Element, typename S>
__device__ void store_tile(const DecodeParams<Element>& p, const float* buffer, int row_tile) {
  const int rank = static_cast<int>(blockIdx.x) % p.cluster, rows = S::kRows / p.cluster;
  const int tokens = min(S::kTokens, p.m);
  for (int i = static_cast<int>(threadIdx.x); i < tokens * rows; i += S::kConsumers) {
    const int token = i / rows, row = rank * rows + i % rows, column = row_tile * S::kRows + row;
    float sum = 0.f;
    for (int from = 0; from < p.cluster; ++from) {
#pragma unroll
      for (int split = 0; split < S::kSplits; ++split) {
        const float* at = buffer + (split * S::kTokens + token) * S::kSumStride + row;
        sum += p.cluster == 1 ? *at : ptx::load_from_block(ptx::shared_address(at), from);
      }
    }
    if (column >= p.n) continue;
    if (p.bias) sum += to_float(p.bias[column]);
    p.output[int64_t{token} * p.n + column] = from_float<Element>(sum);
  }
}

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kTile.threads(), 1)
    decode_kernel(const __grid_constant__ DecodeParams<Element> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-ptx::shared_address(unaligned) & 1023);
  const uint32_t full = ptx::shared_address(shared + S::kBarriersAt), empty = full + 8 * S::kStages;
  auto* buffer = reinterpret_cast<float*>(shared + S::kSumsAt);
  const bool producer = threadIdx.x >= S::kConsumers;
  if (threadIdx.x == S::kConsumers) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(full + 8 * i, 1);
      // The threads of the slot's split. One arrival per warp would do, but compute-sanitizer takes
      // it for a race, and it is no faster.
      ptx::mbarrier_init(empty + 8 * i, 128 * S::kRowTiles);
    }
    ptx::mbarrier_init_fence();
  }
  if (p.static_weights) ptx::let_next_kernel_start();
  __syncthreads();
  if (producer) {
    const Producer<Element, S> produce{p, ptx::shared_address(shared), full, empty};
    const int warp =
        __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 - S::kConsumers / 32, 0);
    if (warp == 0) {
      produce.produce_weights();
    } else {
      produce.produce_input();
    }
    if (p.cluster > 1) {
      ptx::cluster_sync();
      ptx::cluster_sync();
    }
    return;
  }
  ptx::wait_for_earlier_kernels();
  if (!p.static_weights) ptx::let_next_kernel_start();
  Consumer<Element, S> consumer(p, shared, full, empty);
  StageCursor<Element, S> cursor(p);
  int base = 0;  // stages of the tiles done so far
  for (int tile = cursor.row_tile; tile < p.row_tiles; tile += static_cast<int>(gridDim.x)) {
    const int stages = cursor.last - cursor.first;
    for (int i = (consumer.split - base % S::kSplits + S::kSplits) % S::kSplits; i < stages;
         i += S::kSplits) {
      const int slot = (base + i) % S::kStages;
      ptx::mbarrier_wait(full + 8 * slot, (base + i) / S::kStages & 1);
      consumer.multiply(slot);
      ptx::mbarrier_arrive(empty + 8 * slot);
    }
    base += stages;
    consumer.leave_sums(buffer);
    if (p.cluster > 1) {
      ptx::cluster_sync();
      store_tile<Element, S>(p, buffer, tile);
      ptx::cluster_sync();  // a block's sums are read by the others until here
      return;
    }
    ptx::sync_threads<S::kConsumers>();
    store_tile<Element, S>(p, buffer, tile);
    ptx::sync_threads<S::kConsumers>();
  }
#endif
}

}  // namespace marlin::cuda::sm90
