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

  struct Packed {  // of a block
    uint4 words;
    uint2 meta;  // of sparse weights
  };

  __device__ Packed load(int block) const {
    Packed packed{place.words(block), {}};
    if constexpr (S::kSparse) packed.meta = place.meta(block);
    return packed;
  }

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
    constexpr int kBlocks = S::kStageBlocks % 2 == 0 ? 2 : 1;  // whose weights are loaded at a time
    constexpr int kSteps = S::kPeriod / S::kStepColumns;       // between scales
    // Two blocks, or one where two blocks of threads share the registers; with many tokens, one group.
    constexpr int kSpan = S::kBlocksPerSm == 1 ? 4 * kBlocks : 4;
    constexpr int kRoom = kTokens == 16 && kSteps == 2 ? 32 : 64;  // with 64, a register spills
    constexpr int kFit = kTokens < kRoom ? kRoom / kTokens : 1, kWanted = kSpan / kSteps;
    constexpr int kGroups = kWanted < 1 ? 1 : kWanted < kFit ? kWanted : kFit;
    const uint64_t b = place.input_descriptor();
#pragma unroll
    for (int block = 0; block < S::kStageBlocks; block += kBlocks) {
      Packed packed[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) packed[i] = load(block + i);
#pragma unroll
      for (int first = 0; first < 4 * kBlocks; first += kSteps * kGroups) {
        multiply_span<kSteps, kGroups>(packed, b, block * 4 + first, first);
      }
    }
  }

  // kGroups groups of kSteps steps each, from step `at` of the stage on.
  template <int kSteps, int kGroups, int kBlocks>
  __device__ void multiply_span(const Packed (&packed)[kBlocks], uint64_t b, int at, int first) {
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
        const uint4& words = packed[(first + i) / 4].words;
        convert<Element>(a[i], (&words.x)[(first + i) % 4], subtrahend[g]);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = batch; i < batch + kBatch; ++i) {
        multiply_step(partial[g], a[i], packed[(first + i) / 4].meta, b, at + i, i % kSteps > 0);
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

  // Step `step` of the stage, whose activations begin at descriptor `b`.
  __device__ static void multiply_step(float (&partial)[kTokens / 2], const uint32_t (&a)[4],
                                       const uint2& meta, uint64_t b, int step, bool accumulate) {
    constexpr int kStepsOfRow = 64 / S::kStepColumns;  // that lie in 128 bytes of a token
    b += static_cast<uint64_t>(step / kStepsOfRow * kTokens * 8 +
                               step % kStepsOfRow * S::kStepColumns / 8);
    if constexpr (!S::kSparse) {
      ptx::wgmma_m64k16<Element, kTokens>(partial, a, b, accumulate);
    } else if (step % 4 < 2) {  // of a block; see layout::quad_position_of
      ptx::wgmma_sparse_m64k32<Element, kTokens, 0>(partial, a, (&meta.x)[step % 2], b, accumulate);
    } else {
      ptx::wgmma_sparse_m64k32<Element, kTokens, 1>(partial, a, (&meta.x)[step % 2], b, accumulate);
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
