// A consumer warpgroup of a decode kernel (decode.cuh): converts and multiplies.
//
// Weights go into the tensor core as exact integers, and a group's scale is applied in fp32 to the
// group's sum.
#pragma once

#include "cuda/element.cuh"
#include "cuda/sm90/decode_finish.cuh"
#include "cuda/sm90/decode_place.cuh"

namespace marlin::cuda::sm90 {

template <typename Element, typename S>
struct DecodeConsumer {
  using Format = typename ElementTraits<Element>::Format;
  static constexpr int kTokens = S::kTokens;

  const DecodeParams<Element>& p;
  DecodePlace<S> place;
  float sums[kTokens / 2];

  // This split's stages: every kSplits-th of all that the block does.
  __device__ void run() {
    const DecodeBarriers<S> barriers = place.barriers();
    int next = place.split, end = 0, parity = 0;
#pragma unroll 1
    for (DecodeCursor<Element, S> work(p); work.valid(); work.advance()) {
      end += work.stages();
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.f;
#pragma unroll 1
      for (; next < end; next += S::kSplits) {
        place.wait();
        multiply();
        place.release();
        place.advance();
      }
#pragma unroll
      for (int pass = 0; pass < S::kPasses; ++pass) {
        ptx::mbarrier_wait(barriers.sums_free(), parity ^ 1);
        leave_sums(pass);
        ptx::mbarrier_arrive(barriers.sums_full());
        if (work.last() && pass == S::kPasses - 1) {  // nothing else to do
          ptx::mbarrier_wait(barriers.sums_full(), parity);
          DecodeFinish<Element, S>{p, place.base}.template run<S::kConsumers>(
              work, pass, static_cast<int>(threadIdx.x));
        }
        parity ^= 1;
      }
    }
  }

  // One stage, in spans of columns whose multiplications are all under way before the first is waited
  // for: as many groups as there are registers for the sums of.
  __device__ void multiply() {
    constexpr int kSteps = S::kPeriod / 16;  // of 16 columns, between scales
    // 128 columns, or 64 where two blocks share the registers; with many tokens, one group.
    constexpr int kSpan = S::kBlocksPerSm == 1 ? 8 : 4;
    constexpr int kRoom = kTokens == 16 && kSteps == 2 ? 32 : 64;  // with 64, a register spills
    constexpr int kFit = kTokens < kRoom ? kRoom / kTokens : 1, kWanted = kSpan / kSteps;
    constexpr int kGroups = kWanted < 1 ? 1 : kWanted < kFit ? kWanted : kFit;
    const uint64_t b = place.input_descriptor();
#pragma unroll
    for (int half = 0; half < S::kStageBlocks / 2; ++half) {  // 128 columns
      const uint4 words[2] = {place.words(half * 2), place.words(half * 2 + 1)};
#pragma unroll
      for (int first = 0; first < 8; first += kSteps * kGroups) {
        multiply_span<kSteps, kGroups>(words, b, half * 8 + first, first);
      }
    }
  }

  // kGroups groups of kSteps steps each, from step `at` of the stage on.
  template <int kSteps, int kGroups>
  __device__ void multiply_span(const uint4 (&words)[2], uint64_t b, int at, int first) {
    constexpr int kMost = kTokens > 32 ? 2 : 4;  // fragments at a time; with more, registers spill
    constexpr int kBatch = kSteps < kMost ? kSteps : kMost;
    float scale[kGroups][2], partial[kGroups][kTokens / 2];
    uint32_t subtrahend[kGroups][2], a[kGroups * kSteps][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) load_factors(scale[g], subtrahend[g], at / kSteps + g);
#pragma unroll
    for (int batch = 0; batch < kGroups * kSteps; batch += kBatch) {
      const int g = batch / kSteps;
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {
        convert<Element>(a[i], (&words[(first + i) / 4].x)[(first + i) % 4], subtrahend[g]);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {  // 4 steps lie in 128 bytes
        const int step = at + i;
        ptx::wgmma_m64k16<Element, kTokens>(
            partial[g], a[i], b + static_cast<uint64_t>(step / 4 * kTokens * 8 + step % 4 * 2),
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

  // Of this thread's two rows, for a group of the stage.
  __device__ void load_factors(float (&scale)[2], uint32_t (&subtrahend)[2], int group) const {
    if (p.one_group) group = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = to_float(ptx::load_shared<Element>(place.scales(group) + 8 * i * 2));
      subtrahend[i] = layout::subtrahend<Format>(layout::kSymmetricZero, i);
    }
    if (p.has_zeros) {
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
