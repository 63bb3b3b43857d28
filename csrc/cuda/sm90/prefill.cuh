// The GEMM for more than a few tokens on Hopper: `wgmma` with the weights as register operand A,
// persistent blocks.
//
// A tile is up to kRowBlocks pieces of 64 output features by kTokens tokens, one piece per consumer
// warpgroup, which all multiply the same activations. Weights are scaled in registers, that is,
// rounded to the activations' type as `dequantize` rounds them. A producer warpgroup fills a ring of
// stages by bulk copies: weights as they lie, activations, scales and zero points.
//
// Where tiles are too few for the multiprocessors, the blocks of a cluster share a tile's k, leave
// their fp32 sums in shared memory, and each adds, in the order of rank, those of its share of tokens.
//
// Programmatic dependent launch as in decode.cuh.
#pragma once

#include "cuda/element.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/layer.h"
#include "layout/packed.h"
#include "plan/prefill.h"

namespace marlin::cuda::sm90 {

template <typename Element>
struct PrefillParams : LayerParams<Element> {
  int period_log2;       // of the columns between scales: 5, 6 or 7
  int groups_per_block;  // rows of scales from 64 columns of a stage to the next: 0 or 1
  int row_tiles, token_tiles;
  int runs, pieces_per_cluster;  // of a token tile; row blocks of each. Or, where not 0:
  int token_group;               // clusters do whole tiles, in groups of so many token tiles
  int stages, stages_per_block;
  int cluster;  // blocks that share a tile's k
};

template <int kTokens_, int kRowBlocks_, int kStageBlocks_, int kPeriod_>
struct PrefillShape {
  static constexpr plan::PrefillTile kTile{kTokens_, kRowBlocks_, kStageBlocks_};
  static constexpr int kTokens = kTokens_, kStageBlocks = kStageBlocks_;
  static constexpr int kPeriod = kPeriod_;  // 32: columns between scales. 64: or more
  static constexpr int kRowBlocks = kRowBlocks_, kRows = kTile.rows();
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kStages = kTile.stages(), kStageBytes = kTile.stage_bytes();
  static constexpr int kRowBlockBytes = kStageBlocks * layout::kBytesPerBlock;
  static constexpr int kInputAt = 0, kWeightsAt = kTile.input_bytes();
  static constexpr int kScalesAt = kTile.scales_at(), kZerosAt = kTile.zeros_at();
  static constexpr int kOutputAt = kTile.output_at(), kBarriersAt = kTile.barriers_at();
  static constexpr int kSumStride = kTile.sum_stride();
  // Per thread; together, what the block's threads have at its launch.
  static constexpr int kProducerRegisters = kRowBlocks == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters = kRowBlocks == 4 ? 112 : 232;
  static_assert(kStages >= 3 && kStages <= 16 && kTokens % 16 == 0);
  static_assert(kTokens * kSumStride * 4 <= kOutputAt);
};

// The tiles of this block's cluster, in turn. What can be computed is not kept: registers are short.
// Few pieces: a run of neighbours within one token tile.
// Many: every so-many-th whole tile of an order in which those that are done at the same time share
// weights and activations, which then come from the L2 cache.
template <typename Element, typename S>
struct TileCursor {
  const PrefillParams<Element>& p;
  int at;  // a piece of a run (row blocks of the first token tile, then of the next), or a tile

  __device__ explicit TileCursor(const PrefillParams<Element>& params) : p(params) {
    at = p.token_group ? cluster() : first_of_run();
  }
  __device__ int cluster() const { return static_cast<int>(blockIdx.x) / p.cluster; }
  __device__ int first_of_run() const {
    return cluster() / p.runs * p.n_blocks + cluster() % p.runs * p.pieces_per_cluster;
  }
  __device__ int last() const {
    if (p.token_group) return p.row_tiles * p.token_tiles;
    return min(first_of_run() + p.pieces_per_cluster, (cluster() / p.runs + 1) * p.n_blocks);
  }
  __device__ bool valid() const { return at < last(); }
  __device__ void advance() {
    at += p.token_group ? static_cast<int>(gridDim.x) / p.cluster : pieces();
  }
  // Of the group of token tiles that a whole tile is in: its first, and how many it has.
  __device__ int group_first() const { return at / (p.token_group * p.row_tiles) * p.token_group; }
  __device__ int group_size() const { return min(p.token_group, p.token_tiles - group_first()); }
  __device__ int row_block() const {
    if (!p.token_group) return at % p.n_blocks;
    return at % (p.token_group * p.row_tiles) / group_size() * S::kRowBlocks;
  }
  __device__ int token() const {
    if (!p.token_group) return at / p.n_blocks * S::kTokens;
    return (group_first() + at % (p.token_group * p.row_tiles) % group_size()) * S::kTokens;
  }
  __device__ int pieces() const {
    return min(S::kRowBlocks, p.token_group ? p.n_blocks - row_block() : last() - at);
  }
  // This block's share of the tile's k.
  __device__ int first_stage() const {
    return static_cast<int>(blockIdx.x) % p.cluster * p.stages_per_block;
  }
  __device__ int stages() const { return min(p.stages_per_block, p.stages - first_stage()); }
};

// Three warps, so that none waits for another's copies to be issued: for weights, for activations, and
// for scales and zero points. What does not change within a tile is computed once: the ring is filled
// no faster than the longest of these loops runs, and with divisions in them that was half the speed.
template <typename Element, typename S>
struct PrefillProducer {
  using Cursor = TileCursor<Element, S>;
  static constexpr int kArrivals = 3;  // on the barrier of a full stage

  const PrefillParams<Element>& p;
  uint32_t shared, full, empty;
  int slot = 0, parity = 1;  // a new barrier's previous phase counts as complete

  // Waits for the next slot to be free and has one thread call copy(stage address, barrier). The whole
  // warp gets here, so that the compiler keeps addresses in uniform registers, as copies want them.
  template <typename Copy>
  __device__ __forceinline__ void fill_slot(Copy&& copy) {
    ptx::mbarrier_wait(empty + 8 * slot, parity);
    if (ptx::elect_one()) copy(shared + slot * S::kStageBytes, full + 8 * slot);
    __syncwarp();
    if (++slot == S::kStages) slot = 0, parity ^= 1;
  }

  __device__ void run(int warp) {
    if (warp == 1 || !p.static_weights) ptx::wait_for_earlier_kernels();
#pragma unroll 1
    for (Cursor tile(p); tile.valid(); tile.advance()) {
      if (warp == 0) copy_weights(tile);
      if (warp == 1) copy_input(tile);
      if (warp == 2) copy_scales(tile);
      if (p.cluster > 1) {  // the sums of a shared tile lie where the stages were
        ptx::cluster_sync();
        ptx::cluster_sync();
      }
    }
  }

  __device__ void copy_weights(const Cursor& tile) {
    const int pieces = tile.pieces(), first_block = tile.first_stage() * S::kStageBlocks;
    const int32_t* from =
        p.qweight + layout::word_index(tile.row_block(), first_block, p.k_blocks, 0, 0);
    const int64_t to_next_row_block = int64_t{p.k_blocks} * layout::kWordsPerBlock;
    int blocks = min(tile.stages() * S::kStageBlocks, p.k_blocks - first_block);
#pragma unroll 1
    for (; blocks > 0; blocks -= S::kStageBlocks) {
      fill_slot([&](uint32_t stage, uint32_t barrier) {
        const int bytes = min(S::kStageBlocks, blocks) * layout::kBytesPerBlock;
        ptx::mbarrier_arrive_expect(barrier, pieces * bytes);
#pragma unroll
        for (int r = 0; r < S::kRowBlocks; ++r) {
          if (r < pieces) {
            ptx::bulk_copy(stage + S::kWeightsAt + r * S::kRowBlockBytes,
                           from + r * to_next_row_block, bytes, barrier);
          }
        }
      });
      from += S::kStageBlocks * layout::kWordsPerBlock;
    }
  }

  __device__ void copy_input(const Cursor& tile) {
    const int token = tile.token();
    int block = tile.first_stage() * S::kStageBlocks;
    const int last = block + tile.stages() * S::kStageBlocks;
#pragma unroll 1
    for (; block < last; block += S::kStageBlocks) {
      fill_slot([&](uint32_t stage, uint32_t barrier) {
        ptx::mbarrier_arrive_expect(barrier, S::kTile.input_bytes());
        ptx::tensor_copy(stage + S::kInputAt, p.input, 0, token, block, barrier);
      });
    }
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
      fill_slot([&](uint32_t stage, uint32_t barrier) {
        const int group = column >> p.period_log2;
        ptx::mbarrier_arrive_expect(barrier, bytes);
        ptx::tensor_copy(stage + S::kScalesAt, p.scales, row, group, barrier);
        if (p.has_zeros) ptx::tensor_copy(stage + S::kZerosAt, p.zeros, row, group, barrier);
      });
      column += step;
    }
  }
};

template <typename Element, typename S>
struct PrefillConsumer {
  using Format = typename ElementTraits<Element>::Format;
  static constexpr int kTokens = S::kTokens, kStages = S::kStages;

  const PrefillParams<Element>& p;
  char* shared;
  uint32_t full, empty;
  int thread, warpgroup;  // in the warpgroup; which warpgroup, that is, piece of a tile
  // In the first stage: the activations' descriptor, and this thread's weights and scales. Addresses
  // of shared memory, since arithmetic on pointers would be done anew for every stage.
  uint64_t descriptor;
  uint32_t words_at, scales_at, zeros_at;
  int slot = 0, parity = 0;
  float sums[kTokens / 2];

  __device__ PrefillConsumer(const PrefillParams<Element>& params, char* shared_memory,
                             uint32_t full_, uint32_t empty_)
      : p(params),
        shared(shared_memory),
        full(full_),
        empty(empty_),
        thread(static_cast<int>(threadIdx.x) % 128) {
    // By shuffles, so that the compiler knows them to be the same in the whole warp.
    warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    const uint32_t base = __shfl_sync(0xffffffffu, ptx::shared_address(shared_memory), 0);
    descriptor = ptx::wgmma_descriptor(base + S::kInputAt);
    words_at = base + S::kWeightsAt + warpgroup * S::kRowBlockBytes + thread * 16;
    scales_at = base + S::kScalesAt + (warpgroup * 64 + row_in_piece()) * 2;
    zeros_at = base + S::kZerosAt + warpgroup * 64 + row_in_piece();
  }

  __device__ int row_in_piece() const { return thread / 32 * 16 + thread % 32 / 4; }

  __device__ void next_slot() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }

  __device__ void give_back_previous() const {
    ptx::mbarrier_arrive(empty + 8 * (slot == 0 ? kStages - 1 : slot - 1));
  }

  // A tile's stages, where this warpgroup has no piece of it.
  __device__ void skip(int stages) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_wait(full + 8 * slot, parity);
      next_slot();
      give_back_previous();
    }
  }

  // Scales, in both halves of a register, for rows g and g + 8; and what to subtract from nibbles.
  struct RowFactors {
    uint32_t scale[2], subtrahend[2] = {layout::subtrahend<Format>(layout::kSymmetricZero, 0),
                                        layout::subtrahend<Format>(layout::kSymmetricZero, 1)};
  };

  __device__ void load(RowFactors& factors, uint32_t stage, int group) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factors.scale[i] =
          ptx::load_shared<uint16_t>(scales_at + stage + (group * S::kRows + 8 * i) * 2) * 0x10001u;
    }
    if (p.has_zeros) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factors.subtrahend[i] = layout::subtrahend<Format>(
            ptx::load_shared<uint8_t>(zeros_at + stage + group * S::kRows + 8 * i), i);
      }
    }
  }

  // A tile's stages. A stage is given back when the first multiplications of the next have been
  // issued, since at most three may be unfinished then.
  __device__ void multiply(int stages) {
    constexpr int kSets = S::kPeriod == 32 ? 2 : 1;  // of factors per 64 columns
    uint32_t a[4][4];
    RowFactors factors[kSets];
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_wait(full + 8 * slot, parity);
      const uint32_t stage = slot * S::kStageBytes;
      const uint64_t b = descriptor + stage / 16;
      uint4 words[S::kStageBlocks];  // loaded together: their latency then shows once
#pragma unroll
      for (int block = 0; block < S::kStageBlocks; ++block) {
        words[block] = ptx::load_shared<uint4>(words_at + stage + block * layout::kBytesPerBlock);
      }
#pragma unroll
      for (int block = 0; block < S::kStageBlocks; ++block) {
        const uint4& word = words[block];
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          load(factors[set], stage,
               S::kPeriod == 32 ? block * 2 + set : block * p.groups_per_block);
        }
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const RowFactors& factor = factors[step * kSets / 4];
          convert<Element>(a[step], (&word.x)[step], factor.subtrahend);
          multiply_pairs<Element>(a[step], factor.scale);
          ptx::wgmma_fence();
          ptx::wgmma_m64k16<Element, kTokens>(
              sums, a[step], b + static_cast<uint64_t>(block * kTokens * 8 + step * 2),
              (i | block | step) != 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<3>();
        }
        if (block == 0 && i > 0) give_back_previous();
      }
      next_slot();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      asm volatile("" : "+f"(sums[i])::"memory");  // not read before the wait
    }
    give_back_previous();
  }

  __device__ float bias_of(int row) const {
    return p.bias && row < p.n ? to_float(p.bias[row]) : 0.f;
  }

  // Rounds the sums and stores the piece, through shared memory that is this warpgroup's own:
  // [token][64 features], the 16-byte chunks of a row swizzled by the token.
  __device__ void store_piece(const TileCursor<Element, S>& tile) {
    const int row = (tile.row_block() + warpgroup) * 64;
    char* buffer = shared + S::kOutputAt + warpgroup * kTokens * 128;
    const int lane = thread % 32, warp = thread / 32;
    const float bias[2] = {bias_of(row + row_in_piece()), bias_of(row + row_in_piece() + 8)};
    const uint32_t at = ptx::shared_address(buffer) + (lane / 16 * 8 + lane % 8) * 128 +
                        ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = round_pair<Element>(sums[4 * j + 2 * i] + bias[i % 2],
                                       sums[4 * j + 2 * i + 1] + bias[i % 2]);
      }
      ptx::store_matrices_transposed(at + j * 8 * 128, pairs);
    }
    ptx::sync_warpgroup(warpgroup);
    const int tokens = min(kTokens, p.m - tile.token());
    for (int i = thread; i < tokens * 8; i += 128) {
      const int token = i / 8, chunk = i % 8;
      const auto value =
          *reinterpret_cast<const uint4*>(buffer + token * 128 + (chunk ^ token % 8) * 16);
      store_chunk(value, tile.token() + token, row + chunk * 8);
    }
    ptx::sync_warpgroup(warpgroup);  // the next tile's outputs come to the same place
  }

  // Eight features of a token.
  __device__ void store_chunk(const uint4& value, int token, int row) const {
    Element* to = p.output + int64_t{token} * p.n + row;
    if (p.n % 8 == 0) {
      if (row < p.n) *reinterpret_cast<uint4*>(to) = value;
      return;
    }
    const uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row + i < p.n) {
        reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
      }
    }
  }

  // Leaves the sums where the stages were: [token][row].
  __device__ void leave_sums() {
    float* at = reinterpret_cast<float*>(shared) + warpgroup * 64 + row_in_piece();
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + thread % 4 * 2 + i % 2;
      at[token * S::kSumStride + i / 2 % 2 * 8] = sums[i];
    }
  }

  // Adds the cluster's sums in the order of rank and stores this block's share of the tokens.
  __device__ void store_share(const TileCursor<Element, S>& tile) const {
    constexpr int kChunks = S::kRows / 8;
    const int rank = static_cast<int>(blockIdx.x) % p.cluster;
    const int share = (kTokens + p.cluster - 1) / p.cluster, first = rank * share;
    const int tokens = min(share, min(kTokens, p.m - tile.token()) - first);
    for (int i = static_cast<int>(threadIdx.x); i < tokens * kChunks; i += S::kConsumers) {
      const int token = first + i / kChunks, chunk = i % kChunks;
      if (chunk >= tile.pieces() * 8) continue;
      const int row = tile.row_block() * 64 + chunk * 8;
      const uint32_t at = ptx::shared_address(shared) + (token * S::kSumStride + chunk * 8) * 4;
      float sum[8] = {};
      for (int from = 0; from < p.cluster; ++from) ptx::add_from_block(sum, at, from);
      uint4 value;
      uint32_t* pairs = &value.x;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[j] = round_pair<Element>(sum[2 * j] + bias_of(row + 2 * j),
                                       sum[2 * j + 1] + bias_of(row + 2 * j + 1));
      }
      store_chunk(value, tile.token() + token, row);
    }
  }

  __device__ void run() {
    for (TileCursor<Element, S> tile(p); tile.valid(); tile.advance()) {
      const bool works = warpgroup < tile.pieces();
      if (works) {
        multiply(tile.stages());
      } else {
        skip(tile.stages());
      }
      if (p.cluster == 1) {
        if (works) store_piece(tile);
        continue;
      }
      ptx::sync_threads<S::kConsumers>();  // every warpgroup has done with the stages
      if (works) leave_sums();
      ptx::cluster_sync();
      store_share(tile);
      ptx::fence_before_copies();  // the next tile's stages come to where the sums were
      ptx::cluster_sync();         // a block's sums are read by the others until here
    }
  }
};

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kTile.threads(), 1)
    prefill_kernel(const __grid_constant__ PrefillParams<Element> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-ptx::shared_address(unaligned) & 1023);
  const uint32_t full = ptx::shared_address(shared + S::kBarriersAt), empty = full + 8 * S::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(full + 8 * i, PrefillProducer<Element, S>::kArrivals);
      ptx::mbarrier_init(empty + 8 * i, S::kConsumers);
    }
    ptx::mbarrier_init_fence();
  }
  if (p.static_weights) ptx::let_next_kernel_start();
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    ptx::give_registers<S::kProducerRegisters>();
    const int warp =
        __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 - S::kConsumers / 32, 0);
    PrefillProducer<Element, S>{p, ptx::shared_address(shared), full, empty}.run(warp);
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    ptx::wait_for_earlier_kernels();
    if (!p.static_weights) ptx::let_next_kernel_start();
    PrefillConsumer<Element, S>(p, shared, full, empty).run();
  }
#endif
}

}  // namespace marlin::cuda::sm90
