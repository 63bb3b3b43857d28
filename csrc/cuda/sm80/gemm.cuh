// The MARLIN GEMM in `mma.sync` form, for sm_80 and later.
//
// It computes, for one tile of [tokens] x [rows] outputs and a range of k,
//     sums[row, token] = sum over groups of scale[row, group] * sum_k (q - zero)[row, k] x[token, k]
// with the weights as operand A: exact integers into the tensor core, the group's scale in fp32.
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
  static constexpr int kEpilogueAt = kTile.stages * kTile.stage_bytes();

  const Params<Element>& p;
  char* const shared;
  const int thread, split, lane, warp;    // split: which part of a stage's k; warp: which 16 rows
  const int cell_at, scale_at, input_at;  // this thread's first bytes of each in a stage
  float sums[kRowBlocks][kTokenTiles][4] = {};

  __device__ BlockGemm(const Params<Element>& params, char* shared_memory)
      : p(params),
        shared(shared_memory),
        thread(static_cast<int>(threadIdx.x)),
        split(thread / layout::kThreads),
        lane(thread % 32),
        warp(thread % layout::kThreads / 32),
        cell_at(split * (kTile.k_blocks * kRowBlocks * layout::kBytesPerBlock) +
                thread % layout::kThreads * 16),
        scale_at(split * (kTile.warp_k() >> p.scale_shift) * kRows + warp * 16 + lane / 4),
        input_at(Copies::kInputAt + split * kTile.warp_k() * 2 +
                 token_of_lane() * Copies::kInputPitch) {}

  // The token whose row this lane addresses in ldmatrix: matrices go {k, k} or {k, k; 8 tokens on}.
  __device__ int token_of_lane() const { return lane % 8 + (kTokenTiles == 1 ? 0 : lane / 16 * 8); }

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

  // The activations of two k16 steps as operand B: {b0, b1} for every 8 tokens. One ldmatrix reads
  // both steps of 8 tokens, or one step of 16. `input` is this lane's row at a block of 64 columns,
  // that is, 8 chunks; chunk c lies at c ^ (token % 8).
  __device__ void load_fragments(uint32_t (&b)[2][kTokenTiles][2], uint32_t input, int pair) const {
    static_assert(kTokenTiles == 1 || kTokenTiles % 2 == 0);
    const int matrix = lane / 8;
    uint32_t out[4];
    if constexpr (kTokenTiles == 1) {
      ptx::ldmatrix_x4(out, input + ((matrix ^ lane % 8) ^ pair * 4) * 16);
      b[0][0][0] = out[0], b[0][0][1] = out[1], b[1][0][0] = out[2], b[1][0][1] = out[3];
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t chunk = ((matrix % 2 ^ lane % 8) ^ (pair * 4 + step * 2)) * 16;
#pragma unroll
        for (int j = 0; j < kTokenTiles; j += 2) {
          ptx::ldmatrix_x4(out, input + chunk + j * 8 * Copies::kInputPitch);
          b[step][j][0] = out[0], b[step][j][1] = out[1];
          b[step][j + 1][0] = out[2], b[step][j + 1][1] = out[3];
        }
      }
    }
  }

  __device__ void multiply(const char* stage) {
    const uint32_t input = ptx::shared_address(stage) + input_at;
    GroupConstants group = group_constants(stage, 0);
    float partial[kRowBlocks][kTokenTiles][4] = {};
#pragma unroll
    for (int block = 0; block < kTile.k_blocks; ++block) {
      uint4 words[kRowBlocks];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        words[r] = *reinterpret_cast<const uint4*>(
            stage + cell_at + (block * kRowBlocks + r) * layout::kBytesPerBlock);
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int column = block * 64 + pair * 32;
        if (column > 0 && (column & ((1 << p.scale_shift) - 1)) == 0) {  // a new group begins
          add_scaled(partial, group);
          group = group_constants(stage, column >> p.scale_shift);
        }
        uint32_t b[2][kTokenTiles][2];
        load_fragments(b, input + block * 128, pair);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int r = 0; r < kRowBlocks; ++r) {
            const uint32_t word = pair == 0 ? (step == 0 ? words[r].x : words[r].y)
                                            : (step == 0 ? words[r].z : words[r].w);
            uint32_t a[4];
            convert<Element>(a, word, group.subtrahend[r]);
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
              ptx::mma_m16n8k16<Element>(partial[r][j], a, b[step][j][0], b[step][j][1]);
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
