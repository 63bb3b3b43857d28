// A consumer warpgroup of a decode kernel (decode.cuh): converts and multiplies.
//
// With few tokens, weights go into the tensor core as exact integers, and a group's scale is applied in
// fp32 to the group's sum: fewer instructions a weight. With many tokens or short groups that is more work
// than scaling weights, and sums have to be waited for (plan::DecodeTile::scales_weights).
#pragma once

#include "cuda/element.cuh"
#include "cuda/sm90/decode_finish.cuh"
#include "cuda/sm90/decode_place.cuh"
#include "cuda/sm90/step.cuh"

namespace marlin::cuda::sm90 {

template <typename Element, typename S>
struct DecodeConsumer {
  using Format = typename ElementTraits<Element>::Format;
  static constexpr int kTokens = S::kTokens;

  const DecodeParams<Element>& p;
  DecodePlace<S> place;
  float sums[kTokens / 2];

  struct Packed {  // of a block
    uint4 words;
    uint2 meta;  // of sparse weights
  };

  __device__ Packed load(int block) const {
    Packed packed{place.words(block), {}};
    if constexpr (S::kSparse) packed.meta = place.meta(block);
    return packed;
  }

  static constexpr int kPassStored = 3;  // a barrier of the block
  // Whose weights are loaded at a time.
  static constexpr int kBlocks = S::kStageBlocks % 2 == 0 ? 2 : 1;

  // This split's stages: every kSplits-th of all that the block does.
  __device__ void run() {
    const DecodeBarriers<S> barriers = place.barriers();
    int next = place.split, end = 0, parity = 0;
    bool stored = false;  // by the consumers, what they left last
#pragma unroll 1
    for (DecodeCursor<Element, S> work(p); work.valid(); work.advance()) {
      end += work.stages();
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.f;
      if (work.half() && place.row_tile > 0) {
        next = skip(next, end);
      } else {
        next = multiply_stages(next, end);
      }
#pragma unroll
      for (int pass = 0; pass < S::kPasses; ++pass) {
        if (S::kHasFinisher) {
          ptx::mbarrier_wait(barriers.sums_free(), parity ^ 1);
        }
        if ((S::kRuns || S::kPasses > 1) && stored) {
          ptx::barrier_sync<kPassStored, S::kConsumers>();
        }
        stored = work.consumers_store();
        leave_sums(pass);
        ptx::mbarrier_arrive(barriers.sums_full());
        if (stored) {
          ptx::mbarrier_wait(barriers.sums_full(), parity);
          DecodeFinish<Element, S>{p, place.base}.template run<S::kConsumers>(
              work, pass, static_cast<int>(threadIdx.x));
        }
        parity ^= 1;
      }
    }
  }

  __device__ int multiply_stages(int next, int end) {
    if constexpr (S::kPlainLoop) {
      if (!p.has_zeros) return multiply_all<true>(next, end);
    }
    return multiply_all<false>(next, end);
  }

  // Stages `next`, next + kSplits, ... < end; returns the first that is not. kPlain: there are no zero points.
  template <bool kPlain>
  __device__ int multiply_all(int next, int end) {
    if constexpr (kConvertsAhead) {
      return multiply_ahead<kPlain>(next, end);
    } else {
#pragma unroll 1
      for (; next < end; next += S::kSplits) {
        place.wait_for_weights();
        if constexpr (S::kScalesWeights) {
          multiply_scaled<kPlain>();
        } else {
          multiply<kPlain>();
        }
        place.release();
        place.advance();
      }
      return next;
    }
  }

  // Half a tile has no rows for this warpgroup, which gives its stages back. (That it should do every second
  // stage of the rows there are was no faster, and slowed whole tiles by 2 to 4%: activations bound half a
  // tile, for which a stage has as many as for a whole one. H200, M = 64.)
  __device__ int skip(int next, int end) {
#pragma unroll 1
    for (; next < end; next += S::kSplits) {
      place.wait();
      place.release();
      place.advance();
    }
    return next;
  }

  // --- weights scaled in registers ----------------------------------------------------------------
  // Rounded to the activations' type as `dequantize` rounds them.

  // One stage, some blocks at a time: all their weights are converted before the first is multiplied, so
  // that the tensor core is asked for much at once, while other warpgroups convert. Multiplied one by one
  // as below they take longer: 19.0 us, and 17.3, at 8192 x 8192, M = 64.
  template <bool kPlain>
  __device__ void multiply_scaled() {
    constexpr int kSteps = kBlocks * 4, kGroupSteps = S::kPeriod / S::kStepColumns;
    constexpr int kGroups = kSteps > kGroupSteps ? kSteps / kGroupSteps : 1;
    const uint64_t b = place.input_descriptor();
#pragma unroll
    for (int block = 0; block < S::kStageBlocks; block += kBlocks) {
      const int first = block * 4;  // step of the stage
      Packed packed[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) packed[i] = load(block + i);
      uint32_t scale[kGroups][2], subtrahend[kGroups][2], a[kSteps][4];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        load_factor_pairs<kPlain>(scale[g], subtrahend[g], first / kGroupSteps + g);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        convert<Element>(a[i], (&packed[i / 4].words.x)[i % 4], subtrahend[i / kGroupSteps]);
        multiply_pairs<Element>(a[i], scale[i / kGroupSteps]);
      }
      if (block == 0) place.wait_for_input();
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        multiply_step(sums, a[i], packed[i / 4].meta, b, first + i, true);
      }
      ptx::wgmma_commit();
      wait_for_sums();
    }
  }

  // Where a block has but two warpgroups, both have to multiply at any time. Stages `next`, next + kSplits,
  // ... < end; returns the first that is not. Multiplications of a stage are still under way while the next
  // stage's weights are converted; then it is given back. Not of 2:4 weights, whose metadata waits for all
  // multiplications (see load_meta): 66.2 us for 62.2 at 8192 x 28672, M = 128 (H200).
  static constexpr bool kConvertsAhead = S::kScalesWeights && S::kSplits == 1 && !S::kSparse;
  static_assert(!kConvertsAhead || (S::kStages > 1 && S::kInputStages > 1));
  template <bool kPlain>
  __device__ int multiply_ahead(int next, int end) {
    constexpr int kSteps = S::kStageBlocks * 4, kGroupSteps = S::kPeriod / S::kStepColumns;
    constexpr int kBatch = 4;  // steps, which lie in one half of `a`
    static_assert(kSteps % (2 * kBatch) == 0);
    if (next >= end) return next;
    uint32_t a[2 * kBatch][4];
    typename DecodePlace<S>::Held previous{};
#pragma unroll 1
    for (; next < end; next += S::kSplits) {
      place.wait();
      const uint64_t b = place.input_descriptor();
      uint4 words[S::kStageBlocks];
#pragma unroll
      for (int block = 0; block < S::kStageBlocks; ++block) words[block] = place.words(block);
      uint32_t scale[S::kGroups][2], subtrahend[S::kGroups][2];
#pragma unroll
      for (int g = 0; g < S::kGroups; ++g) {
        load_factor_pairs<kPlain>(scale[g], subtrahend[g], g);
      }
#pragma unroll
      for (int step = 0; step < kSteps; step += kBatch) {
#pragma unroll
        for (int i = step; i < step + kBatch; ++i) {
          const int g = i / kGroupSteps;
          convert<Element>(a[i % (2 * kBatch)], (&words[i / 4].x)[i % 4], subtrahend[g]);
          multiply_pairs<Element>(a[i % (2 * kBatch)], scale[g]);
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int i = step; i < step + kBatch; ++i) {
          multiply_step(sums, a[i % (2 * kBatch)], {}, b, i, true);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (step == 0 && previous.weights) place.release(previous);
      }
      previous = place.hold();
      place.advance();
    }
    wait_for_sums();
    place.release(previous);
    return next;
  }

  __device__ void wait_for_sums() {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      asm volatile("" : "+f"(sums[i])::"memory");  // not read before the wait
    }
  }

  // --- exact integers, a group's sum scaled -------------------------------------------------------

  // One stage, in spans of columns whose multiplications are all under way before the first is waited
  // for: as many groups as there are registers for the sums of.
  template <bool kPlain>
  __device__ void multiply() {
    constexpr int kSteps = S::kPeriod / S::kStepColumns;  // between scales
    // Two blocks, or one where two blocks of threads share the registers; with many tokens, one group.
    constexpr int kSpan = S::kBlocksPerSm == 1 ? 4 * kBlocks : 4;
    // With more, a register spills.
    constexpr bool kTight =
        (kTokens == 16 && kSteps == 2) || (S::kRuns && kTokens == 8 && kSteps == 1);
    constexpr bool kTightest = S::kSplits > 4 && kSteps == 2;
    constexpr int kRoom = kTightest ? 16 : kTight ? 32 : 64;
    constexpr int kFit = kTokens < kRoom ? kRoom / kTokens : 1, kWanted = kSpan / kSteps;
    constexpr int kGroups = kWanted < 1 ? 1 : kWanted < kFit ? kWanted : kFit;
    // With many tokens the first span is converted whole before its activations are waited for: 17.3 us
    // for 17.8 at 8192 x 8192, M = 64; with fewer it is 2 to 4% slower.
    constexpr bool kWaitsLate = kTokens > 32;
    if (!kWaitsLate) place.wait_for_input();
    const uint64_t b = place.input_descriptor();
#pragma unroll
    for (int block = 0; block < S::kStageBlocks; block += kBlocks) {
      Packed packed[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) packed[i] = load(block + i);
#pragma unroll
      for (int first = 0; first < 4 * kBlocks; first += kSteps * kGroups) {
        if (kWaitsLate && block + first == 0) {
          multiply_span<kPlain, kSteps, kGroups, true>(packed, b, 0, 0);
        } else {
          multiply_span<kPlain, kSteps, kGroups, false>(packed, b, block * 4 + first, first);
        }
      }
    }
  }

  // kGroups groups of kSteps steps each, from step `at` of the stage on; all are converted before the
  // activations are waited for where kWaits.
  template <bool kPlain, int kSteps, int kGroups, bool kWaits>
  __device__ void multiply_span(const Packed (&packed)[kBlocks], uint64_t b, int at, int first) {
    constexpr int kMost = kTokens > 32 ? 2 : 4;  // fragments at a time; with more, registers spill
    constexpr int kBatch = kWaits ? kGroups * kSteps : kSteps < kMost ? kSteps : kMost;
    float scale[kGroups][2], partial[kGroups][kTokens / 2];
    uint32_t subtrahend[kGroups][2], a[kGroups * kSteps][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      load_factors<kPlain>(scale[g], subtrahend[g], at / kSteps + g);
    }
#pragma unroll
    for (int batch = 0; batch < kGroups * kSteps; batch += kBatch) {
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {
        const uint4& words = packed[(first + i) / 4].words;
        convert<Element>(a[i], (&words.x)[(first + i) % 4], subtrahend[i / kSteps]);
      }
      if constexpr (kWaits) place.wait_for_input();
      ptx::wgmma_fence();
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {
        multiply_step(partial[i / kSteps], a[i], packed[(first + i) / 4].meta, b, at + i,
                      i % kSteps > 0);
      }
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        asm volatile("" : "+f"(partial[g][i])::"memory");  // not read before the wait
        sums[i] = fmaf(partial[g][i], scale[g][i / 2 % 2], sums[i]);
      }
    }
  }

  // Step `step` of the stage, whose activations begin at descriptor `stage`.
  __device__ void multiply_step(float (&to)[kTokens / 2], const uint32_t (&a)[4], const uint2& meta,
                                uint64_t stage, int step, bool accumulate) const {
    const int tokens = S::kTile.input_tokens_vary() ? p.input_tokens : S::kTile.tokens;
    const uint64_t b = input_of_step<S::kSparse>(stage, step, tokens);
    sm90::multiply_step<Element, kTokens, S::kSparse>(to, a, meta, b, step % 4, accumulate);
  }

  // Of this thread's two rows, for a group of the stage.
  template <bool kPlain>
  __device__ void load_factors(float (&scale)[2], uint32_t (&subtrahend)[2], int group) const {
    if (p.one_group) group = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = to_float(ptx::load_shared<Element>(place.scales(group) + 8 * i * 2));
    }
    load_subtrahends<kPlain>(subtrahend, group);
  }

  // The same, but scales in both halves of a register.
  template <bool kPlain>
  __device__ void load_factor_pairs(uint32_t (&scale)[2], uint32_t (&subtrahend)[2],
                                    int group) const {
    if (p.one_group) group = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = ptx::twice(ptx::load_shared<uint16_t>(place.scales(group) + 8 * i * 2));
    }
    load_subtrahends<kPlain>(subtrahend, group);
  }

  template <bool kPlain>
  __device__ void load_subtrahends(uint32_t (&subtrahend)[2], int group) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      subtrahend[i] = layout::subtrahend<Format>(layout::kSymmetricZero, i);
    }
    if (!kPlain && p.has_zeros) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        subtrahend[i] =
            layout::subtrahend<Format>(ptx::load_shared<uint8_t>(place.zeros(group) + 8 * i), i);
      }
    }
  }

  // Leaves the sums of a pass as [split][token][row].
  __device__ void leave_sums(int pass) const {
    constexpr int kEach = S::kPassTokens / 2;
    const uint32_t to =
        place.base + S::kSumsAt + (place.split * S::kPassTokens * S::kSumStride + place.row()) * 4;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = i / 4 * 8 + place.thread() % 4 * 2 + i % 2;
      ptx::store_shared(to + (token * S::kSumStride + i / 2 % 2 * 8) * 4, sums[pass * kEach + i]);
    }
  }
};

}  // namespace marlin::cuda::sm90
