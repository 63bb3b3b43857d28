// The MARLIN GEMM in `mma.sync` form, for sm_80 and later.
//
// It computes, for one tile of [tokens] x [rows] outputs and a range of k,
//     sums[row, token] = sum over groups of scale[row, group] * sum_k (q - zero)[row, k] x[token, k]
// with the weights as operand A: exact integers into the tensor core, the group's scale in fp32. 2:4
// sparse weights differ in three places: the metadata that the loader brings along, how activations
// reach the registers, and the instruction that multiplies.
//
// A block does an equal share of all (tile, k) units, tile after tile, through one continuous
// pipeline of asynchronous copies, so it never drains between tiles (the balanced partition of
// arXiv 2408.11743, section 3.4). A tile that several blocks share leaves fp32 partial sums in the
// workspace, which reduce.cuh adds in the order of k: nothing is locked, nothing is atomic, and the
// same input gives the same bits.
//
// Warps: sets of 4, a warp taking 16 rows of every row block; `warps_k` such sets split a stage's k.
// What a warp does per stage besides converting and multiplying is what decides small M, so all
// addresses are carried along and moved by constants (with `lop3` written out and two blocks of k per
// stage: 28.3 to 15.5 us, 8192 x 8192, M = 1, H200; the three were not measured apart).
#pragma once

#include "cuda/element.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm80/loader.cuh"

namespace marlin::cuda::sm80 {

template <typename Element, typename S>
struct BlockGemm {
  using Copies = Loader<Element, S>;
  using Format = typename ElementTraits<Element>::Format;
  static constexpr plan::Tile kTile = S::kTile;
  static constexpr int kTokens = kTile.tokens, kRowBlocks = kTile.row_blocks;
  static constexpr int kRows = kTile.rows(), kWarpsK = kTile.warps_k, kThreads = kTile.threads();
  static constexpr int kTokenTiles = kTokens / 8;  // fragments along the tokens
  // What is multiplied at a time, 32 columns, the shortest group: two words of a thread's four, or one
  // whose survivors stand for as many.
  static constexpr int kSpans = kTile.block_k() / 32;
  static constexpr int kSteps = layout::kWordsPerThread / kSpans;
  // Whether an ldmatrix reads 32 columns of 8 tokens, or else 16 of 16. The sparse instruction wants the
  // former, four registers in a row; of 8 tokens there is no other way.
  static constexpr bool kLoadsSpans = kTile.sparse || kTokenTiles == 1;
  static constexpr int kEpilogueAt = kTile.stages * kTile.stage_bytes();

  const Params<Element>& p;
  char* const shared;
  const int thread, split, lane, warp;  // split: which part of a stage's k; warp: which 16 rows
  const int cell_at, meta_at, scale_at, input_at;  // this thread's first bytes of each in a stage
  float sums[kRowBlocks][kTokenTiles][4] = {};

  __device__ BlockGemm(const Params<Element>& params, char* shared_memory)
      : p(params),
        shared(shared_memory),
        thread(static_cast<int>(threadIdx.x)),
        split(thread / layout::kThreads),
        lane(thread % 32),
        warp(thread % layout::kThreads / 32),
        cell_at(split * (Copies::kSplitBlocks * layout::kBytesPerBlock) +
                thread % layout::kThreads * 16),
        meta_at(Copies::kMetaAt + split * (Copies::kSplitBlocks * layout::kMetaBytesPerBlock) +
                thread % layout::kThreads * 8),
        scale_at(split * (kTile.warp_k() >> p.scale_shift) * kRows + warp * 16 + lane / 4),
        input_at(Copies::kInputAt + split * kTile.warp_k() * 2 +
                 token_of_lane() * Copies::kInputPitch) {}

  // The token whose row this lane addresses in ldmatrix: matrices go {k, k, k, k} or {k, k; 8 tokens on}.
  __device__ int token_of_lane() const { return lane % 8 + (kLoadsSpans ? 0 : lane / 16 * 8); }

  // --- multiplication -------------------------------------------------------------------------

  // The two rows of each row block that this thread's fragments hold: g and g + 8 of its warp's 16.
  struct GroupConstants {
    float scale[kRowBlocks][2];
    uint32_t subtrahend[kRowBlocks][2];
  };

  __device__ GroupConstants group_constants(const char* stage, int scale_row) const {
    GroupConstants out;
    const auto* scales = reinterpret_cast<const Element*>(stage + Copies::kScalesAt) + scale_at;
    const auto* zeros = reinterpret_cast<const uint8_t*>(stage + Copies::kZerosAt) + scale_at;
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = scale_row * kRows + r * 64 + 8 * i;
        const uint32_t zero = p.zeros ? zeros[at] : layout::kSymmetricZero;
        out.scale[r][i] = to_float(scales[at]);
        out.subtrahend[r][i] = layout::subtrahend<Format>(zero, i);
      }
    }
    return out;
  }

  // The activations of 32 columns as operand B: for every 8 tokens a register for every 8 columns.
  // `column` counts from `input`, this lane's row where its warp's part of the stage begins. 64 columns
  // are 8 chunks; chunk c lies at c ^ (token % 8).
  __device__ void load_fragments(uint32_t (&b)[kTokenTiles][4], uint32_t input, int column) const {
    static_assert(kLoadsSpans || kTokenTiles % 2 == 0);
    const int matrix = lane / 8, first_chunk = column % 64 / 8;
    input += column / 64 * 128;
    if constexpr (kLoadsSpans) {
      const uint32_t chunk = ((matrix ^ lane % 8) ^ first_chunk) * 16;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        ptx::ldmatrix_x4(b[j], input + chunk + j * 8 * Copies::kInputPitch);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t chunk = ((matrix % 2 ^ lane % 8) ^ (first_chunk + i)) * 16;
#pragma unroll
        for (int j = 0; j < kTokenTiles; j += 2) {
          uint32_t out[4];
          ptx::ldmatrix_x4(out, input + chunk + j * 8 * Copies::kInputPitch);
          b[j][i] = out[0], b[j][i + 1] = out[1];
          b[j + 1][i] = out[2], b[j + 1][i + 1] = out[3];
        }
      }
    }
  }

  __device__ static uint32_t word_of(const uint4& cell, int i) {
    return i == 0 ? cell.x : i == 1 ? cell.y : i == 2 ? cell.z : cell.w;
  }

  // Word `word` of a block, as fragment `a`, times 8 tokens. Lanes 0 and 1 of every four hold the
  // metadata of words 0 and 1, lanes 2 and 3 that of words 2 and 3.
  __device__ static void multiply_word(float (&partial)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4], int word, const uint2& meta) {
    if constexpr (kTile.sparse) {
      const uint32_t places = word % 2 == 0 ? meta.x : meta.y;
      if (word < 2) {
        ptx::mma_sp_m16n8k32<Element, 0>(partial, a, b, places);
      } else {
        ptx::mma_sp_m16n8k32<Element, 1>(partial, a, b, places);
      }
    } else {
      const int first = word % 2 * 2;
      ptx::mma_m16n8k16<Element>(partial, a, b[first], b[first + 1]);
    }
  }

  __device__ void multiply(const char* stage) {
    const uint32_t input = ptx::shared_address(stage) + input_at;
    GroupConstants group = group_constants(stage, 0);
    float partial[kRowBlocks][kTokenTiles][4] = {};
#pragma unroll
    for (int block = 0; block < kTile.k_blocks; ++block) {
      uint4 cells[kRowBlocks];
      uint2 meta[kRowBlocks] = {};
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        const int at = block * kRowBlocks + r;
        cells[r] = *reinterpret_cast<const uint4*>(stage + cell_at + at * layout::kBytesPerBlock);
        if constexpr (kTile.sparse) {
          meta[r] =
              *reinterpret_cast<const uint2*>(stage + meta_at + at * layout::kMetaBytesPerBlock);
        }
      }
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        const int column = block * kTile.block_k() + span * 32;
        if (column > 0 && (column & ((1 << p.scale_shift) - 1)) == 0) {  // a new group begins
          add_scaled(partial, group);
          group = group_constants(stage, column >> p.scale_shift);
        }
        uint32_t b[kTokenTiles][4];
        load_fragments(b, input, column);
#pragma unroll
        for (int word = span * kSteps; word < (span + 1) * kSteps; ++word) {
#pragma unroll
          for (int r = 0; r < kRowBlocks; ++r) {
            uint32_t a[4];
            convert<Element>(a, word_of(cells[r], word), group.subtrahend[r]);
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
              multiply_word(partial[r][j], a, b[j], word, meta[r]);
            }
          }
        }
      }
    }
    add_scaled(partial, group);
  }

  __device__ void add_scaled(float (&partial)[kRowBlocks][kTokenTiles][4],
                             const GroupConstants& group) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[r][j][i] = fmaf(partial[r][j][i], group.scale[r][i / 2], sums[r][j][i]);
          partial[r][j][i] = 0.f;
        }
      }
    }
  }

  // --- epilogue -------------------------------------------------------------------------------

  // Adds the splits' sums in a fixed order through shared memory, which also turns fragments into
  // rows of outputs, and stores them: to the output where this block did the whole tile, else as
  // partial sum number `slot` of this block.
  __device__ void finish(const Unit& u, bool whole, int slot) {
    auto* buffer = reinterpret_cast<float*>(shared + kEpilogueAt);
    constexpr int kAtOnce = kTile.epilogue_tokens(), kStride = kTile.epilogue_stride();
#pragma unroll
    for (int first = 0; first < kTokens; first += kAtOnce) {
#pragma unroll 1
      for (int turn = 0; turn < kWarpsK; ++turn) {
        if (split == turn) accumulate(buffer, first / 8, turn == 0);
        __syncthreads();
      }
      const int tokens = min(kAtOnce, p.m - u.token_tile * kTokens - first);
      for (int i = thread; i < tokens * kRows; i += kThreads) {
        const int t = i / kRows, row = i % kRows;
        store(u, first + t, row, buffer[t * kStride + row], whole, slot);
      }
      __syncthreads();  // before the buffer is written again
    }
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][j][i] = 0.f;
      }
    }
  }

  __device__ void accumulate(float* buffer, int first_fragment, bool overwrite) const {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        if (j < first_fragment || j >= first_fragment + kTile.epilogue_tokens() / 8) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = (j - first_fragment) * 8 + lane % 4 * 2 + i % 2;
          const int row = r * 64 + warp * 16 + lane / 4 + i / 2 * 8;
          float& at = buffer[t * kTile.epilogue_stride() + row];
          at = overwrite ? sums[r][j][i] : at + sums[r][j][i];
        }
      }
    }
  }

  __device__ void store(const Unit& u, int t, int row, float sum, bool whole, int slot) const {
    if (whole) {
      const int column = u.row_tile * kRows + row;
      if (column >= p.n) return;
      if (p.bias) sum += to_float(p.bias[column]);
      p.output[int64_t{u.token_tile * kTokens + t} * p.n + column] = from_float<Element>(sum);
    } else {
      p.partials[((int64_t{blockIdx.x} * 2 + slot) * kTokens + t) * kRows + row] = sum;
    }
  }

  // --- the block's share ----------------------------------------------------------------------

  __device__ void run() {
    const plan::Partition& part = p.partition;
    const int64_t begin = blockIdx.x * part.units_per_block;
    const int64_t end = min(begin + part.units_per_block, part.units());
    Copies copies(p, begin, end);
    Unit unit(part, begin);
    char* const stages_end = shared + kEpilogueAt;
    const auto next = [&](char* stage) {
      return stage + kTile.stage_bytes() == stages_end ? shared : stage + kTile.stage_bytes();
    };

    char *stage = shared, *stage_to_load = shared;
    for (int i = 0; i < kTile.stages - 1; ++i, stage_to_load = next(stage_to_load)) {
      copies.load(ptx::shared_address(stage_to_load));
    }
    bool from_start = unit.stage_of_tile == 0;  // this block began the tile
    int segment = 0;
    for (int left = static_cast<int>(end - begin); left > 0; --left) {
      ptx::cp_async_wait<kTile.stages - 2>();
      __syncthreads();  // the stage has come, from all threads; and the one to overwrite is read
      copies.load(ptx::shared_address(stage_to_load));
      multiply(stage);
      if (unit.ends_tile(part) || left == 1) {
        finish(unit, from_start && unit.ends_tile(part), min(segment, 1));
        from_start = true;
        ++segment;
      }
      unit.advance(part);
      stage = next(stage);
      stage_to_load = next(stage_to_load);
    }
  }
};

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kTile.threads(), 1)
    gemm_kernel(const __grid_constant__ Params<Element> params) {
  extern __shared__ __align__(128) char shared[];
  BlockGemm<Element, S>(params, shared).run();
}

}  // namespace marlin::cuda::sm80
