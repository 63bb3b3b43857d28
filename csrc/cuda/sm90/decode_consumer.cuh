// A consumer warpgroup of a decode kernel (decode.cuh) for up to 64 tokens: converts and multiplies.
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
      ptx::mbarrier_wait(barriers.sums_free(), parity ^ 1);
      leave_sums();
      ptx::mbarrier_arrive(barriers.sums_full());
      if (work.last()) {  // nothing else to do
        ptx::mbarrier_wait(barriers.sums_full(), parity);
        DecodeFinish<Element, S>{p, place.base}.template run<S::kConsumers>(
            work, static_cast<int>(threadIdx.x));
      }
      parity ^= 1;
    }
  }

  // One stage.
  __device__ void multiply() {
    const uint64_t b = place.input_descriptor();
    constexpr int kSteps = S::kPeriod / 16;  // of 16 columns, between scales
#pragma unroll
    for (int half = 0; half < S::kStageBlocks / 2; ++half) {  // 128 columns
      const uint4 words[2] = {place.words(half * 2), place.words(half * 2 + 1)};
#pragma unroll
      for (int first = 0; first < 8; first += kSteps) {
        multiply_group(words, b, half * 8 + first, first);
      }
    }
  }

  // The kPeriod columns from step `at` of the stage on: they have one scale per row.
  __device__ void multiply_group(const uint4 (&words)[2], uint64_t b, int at, int first) {
    constexpr int kMost = kTokens > 32 ? 2 : 4;  // fragments at a time; with more, registers spill
    constexpr int kSteps = S::kPeriod / 16, kBatch = kSteps < kMost ? kSteps : kMost;
    const int group = p.one_group ? 0 : at / kSteps;
    float scale[2], partial[kTokens / 2];
    uint32_t subtrahend[2], a[kSteps][4];
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
#pragma unroll
    for (int batch = 0; batch < kSteps; batch += kBatch) {
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {
        convert<Element>(a[i], (&words[(first + i) / 4].x)[(first + i) % 4], subtrahend);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {  // 4 steps lie in 128 bytes
        const int step = at + i;
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

  // Leaves the sums as [split][token][row].
  __device__ void leave_sums() const {
    const uint32_t to =
        place.base + S::kSumsAt + (place.split * kTokens * S::kSumStride + place.row()) * 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + place.thread() % 4 * 2 + i % 2;
      ptx::store_shared(to + (token * S::kSumStride + i / 2 % 2 * 8) * 4, sums[i]);
    }
  }
};

}  // namespace marlin::cuda::sm90
