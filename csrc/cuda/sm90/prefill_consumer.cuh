// A consumer warpgroup of a prefill kernel (prefill.cuh): converts, multiplies and stores.
#pragma once

#include "cuda/element.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/prefill_tiles.cuh"
#include "cuda/sm90/ring.cuh"

namespace marlin::cuda::sm90 {

template <typename Element, typename S>
struct PrefillConsumer {
  using Format = typename ElementTraits<Element>::Format;
  using Cursor = PrefillCursor<Element, S>;
  static constexpr int kTokens = S::kTokens;

  const PrefillParams<Element>& p;
  char* shared;
  int thread, warpgroup;  // in the warpgroup; which warpgroup, that is, piece of a tile
  // In the first stage: the low half of the activations' descriptor, and this thread's weights and scales.
  // Addresses of shared memory, since arithmetic on pointers would be done anew for every stage; and kept,
  // since so would this.
  uint32_t input_at, words_at, scales_at, zeros_at, meta_at;
  RingConsumer<S::kStages, 1> ring;
  float sums[kTokens / 2];

  __device__ PrefillConsumer(const PrefillParams<Element>& params, char* shared_memory,
                             uint32_t full)
      : p(params),
        shared(shared_memory),
        thread(static_cast<int>(threadIdx.x) % 128),
        ring(full, 0) {
    // By shuffles, so that the compiler knows them to be the same in the whole warp.
    warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    const uint32_t base = __shfl_sync(0xffffffffu, ptx::shared_address(shared_memory), 0);
    input_at = ptx::wgmma_descriptor_low(base + S::kInputAt);
    words_at = base + S::kWeightsAt + warpgroup * S::kRowBlockBytes + thread * 16;
    scales_at = base + S::kScalesAt + (warpgroup * 64 + row_in_piece()) * 2;
    zeros_at = base + S::kZerosAt + warpgroup * 64 + row_in_piece();
    meta_at = base + S::kMetaAt + warpgroup * S::kMetaBytes + thread * 8;
    for (uint32_t* kept : {&input_at, &words_at, &scales_at, &zeros_at, &meta_at}) {
      ptx::keep(*kept);
    }
  }

  __device__ int row_in_piece() const { return thread / 32 * 16 + thread % 32 / 4; }

  // A tile's stages, where this warpgroup has no piece of it.
  __device__ void skip(int stages) {
    for (int i = 0; i < stages; ++i) {
      ring.wait();
      ptx::mbarrier_arrive(ring.empty());
      ring.advance();
    }
  }

  // Scales, in both halves of a register, for rows g and g + 8; and what to subtract from nibbles.
  struct RowFactors {
    uint32_t scale[2], subtrahend[2];
  };

  // Of a stage's groups; kPlain: without zero points.
  template <bool kPlain, int kGroups>
  __device__ void load(RowFactors (&factors)[kGroups], uint32_t stage) const {
    const auto row_of = [&](int g) {
      return (S::kPeriod == 32 ? g : g * p.groups_per_block) * S::kRows;
    };
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factors[g].scale[i] =
            ptx::twice(ptx::load_shared<uint16_t>(scales_at + stage + (row_of(g) + 8 * i) * 2));
        factors[g].subtrahend[i] = layout::subtrahend<Format>(layout::kSymmetricZero, i);
      }
    }
    if constexpr (!kPlain) {
      if (!p.has_zeros) return;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          factors[g].subtrahend[i] = layout::subtrahend<Format>(
              ptx::load_shared<uint8_t>(zeros_at + stage + row_of(g) + 8 * i), i);
        }
      }
    }
  }

  // A tile's stages. A batch of steps is multiplied while the next is converted; a stage is given back when
  // the first batch of the next has been issued. Every instruction here counts: beside multiplications of
  // 144 tokens and fewer a warp's other instructions take time of their own. So symmetric weights whose
  // scales are at least a stage apart have a loop of their own (kPlain).
  static constexpr int kStageGroups = S::kStageBlocks * S::kSets;
  static constexpr bool kPlainLoop = kTokens < 160 && S::kPeriod > 32;
  __device__ bool plain() const {
    return kPlainLoop && !p.has_zeros && (kStageGroups == 1 || p.groups_per_block == 0);
  }

  template <bool kPlain>
  __device__ void multiply(int stages) {
    constexpr int kSteps = S::kStageBlocks * 4;
    constexpr int kBatch = S::kStageBlocks == 2 ? 4 : 2;  // steps, which lie in one half of `a`
    static_assert(kSteps % (2 * kBatch) == 0);
    constexpr int kGroups = kPlain ? 1 : kStageGroups;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.f;
    uint32_t a[2 * kBatch][4], previous = 0;
#pragma unroll 1
    for (int left = stages; left > 0; --left) {
      ring.wait();
      const uint32_t stage = ring.template offset<S::kStageBytes>();
      uint4 words[S::kStageBlocks];  // loaded together: their latency then shows once
#pragma unroll
      for (int block = 0; block < S::kStageBlocks; ++block) {
        words[block] = ptx::load_shared<uint4>(words_at + stage + block * layout::kBytesPerBlock);
      }
      RowFactors factors[kGroups];
      load<kPlain>(factors, stage);
      const uint64_t b = ptx::wgmma_descriptor_of(input_at + stage / 16);
      uint2 meta{};
#pragma unroll
      for (int step = 0; step < kSteps; step += kBatch) {
#pragma unroll
        for (int i = step; i < step + kBatch; ++i) {
          const RowFactors& factor = factors[i * kGroups / kSteps];
          convert<Element>(a[i % (2 * kBatch)], (&words[i / 4].x)[i % 4], factor.subtrahend);
          multiply_pairs<Element>(a[i % (2 * kBatch)], factor.scale);
        }
        if (S::kSparse && step % 4 == 0) {
          ptx::wgmma_wait<0>();
          meta = load_meta(meta_at + stage + step / 4 * layout::kMetaBytesPerBlock);
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int i = step; i < step + kBatch; ++i) {
          multiply_step<Element, kTokens, S::kSparse>(
              sums, a[i % (2 * kBatch)], meta, input_of_step<S::kSparse>(b, i, p.input_tokens),
              i % 4, true);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (step == 0 && previous) ptx::mbarrier_arrive(previous);
      }
      previous = ring.empty();
      ring.advance();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      asm volatile("" : "+f"(sums[i])::"memory");  // not read before the wait
    }
    ptx::mbarrier_arrive(previous);
  }

  __device__ float bias_of(int row) const {
    return p.bias && row < p.n ? to_float(p.bias[row]) : 0.f;
  }

  // Rounds the sums and stores the piece, through shared memory that is this warpgroup's own:
  // [token][64 features], the 16-byte chunks of a row swizzled by the token, as the copy engine takes them.
  // It stores while the next tile is multiplied: all multiprocessors come to the end of a tile at about the
  // same time, and L2 takes 2 us for what they store then. Threads store rows that are no multiple of 16
  // bytes, and a last tile that begins early.
  __device__ void store_piece(const Cursor& tile) {
    const int row = (tile.row_block() + warpgroup) * 64;
    char* buffer = shared + S::kOutputAt + warpgroup * kTokens * 128;
    const int lane = thread % 32, warp = thread / 32;
    const float bias[2] = {bias_of(row + row_in_piece()), bias_of(row + row_in_piece() + 8)};
    wait_until_read();
    ptx::sync_warpgroup(warpgroup);  // the buffer is free
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
    ptx::fence_before_copies();
    ptx::sync_warpgroup(warpgroup);
    const int first = tile.first_token(), begin = tile.token() - first;
    if (p.copies_output && begin == 0) {
      if (thread == 0) ptx::tensor_store(p.output_map, row, first, ptx::shared_address(buffer));
      return;
    }
    const int tokens = min(kTokens, p.m - first);
    for (int i = begin * 8 + thread; i < tokens * 8; i += 128) {
      const int token = i / 8, chunk = i % 8;
      const auto value =
          *reinterpret_cast<const uint4*>(buffer + token * 128 + (chunk ^ token % 8) * 16);
      store_chunk(value, first + token, row + chunk * 8);
    }
  }

  // Until the copy engine has read this warpgroup's last piece, if there was one.
  __device__ void wait_until_read() const {
    if (thread == 0) ptx::copies_have_read();
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

  // --- tiles that blocks share over memory --------------------------------------------------------

  // For another block, whose threads at the same place read it. A helper warp raises the flags, so that nobody
  // here waits until others can see the sums.
  __device__ void leave_sums(const Cursor& tile) const {
    float4* to = PrefillPartials<Element, S>{p}.sums(tile.block(), warpgroup) + thread;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      to[i * 128] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    }
  }
  __device__ void tell_of_sums() const { ptx::barrier_arrive<S::kSumsLeft, S::kConsumers + 32>(); }

  // Those that others have left, in the order of their numbers.
  __device__ void add_sums(const Cursor& tile) {
    if (!tile.gathers()) return;
    const PrefillPartials<Element, S> partials{p};
    const int first = tile.first_sender(), end = tile.block();
    for (int sender = first + thread; sender < end; sender += 128) {
      await_sums(partials.flag(sender, warpgroup));
    }
    ptx::sync_warpgroup(warpgroup);
#pragma unroll 1
    for (int sender = first; sender < end; ++sender) {
      const float4* from = partials.sums(sender, warpgroup) + thread;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        const float4 more = __ldcg(from + i * 128);
        sums[4 * i] += more.x, sums[4 * i + 1] += more.y;
        sums[4 * i + 2] += more.z, sums[4 * i + 3] += more.w;
      }
    }
  }

  // --------------------------------------------------------------------------------------------------

  __device__ void finish(const Cursor& tile) {
    if (tile.sends()) {
      leave_sums(tile);
    } else {
      add_sums(tile);
      store_piece(tile);
    }
  }

  __device__ void run() {
    for (Cursor tile(p); tile.valid(); tile.advance()) {
      if (warpgroup < tile.pieces()) {
        if (plain()) {
          multiply<true>(tile.stages());
        } else {
          multiply<false>(tile.stages());
        }
        finish(tile);
      } else {
        skip(tile.stages());
      }
      if (tile.sends()) tell_of_sums();
    }
    wait_until_read();  // shared memory is another block's afterwards
  }
};

}  // namespace marlin::cuda::sm90
