// The end of a tile of a decode kernel (decode.cuh): adds the splits' sums and stores the outputs.
#pragma once

#include "cuda/element.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/sm90/decode_tiles.cuh"

namespace marlin::cuda::sm90 {

// Of a tile that a pair shares, each block stores half of the rows, and sends its sums of the others to
// the other block, whose barrier counts the bytes. Addition of two numbers is commutative, so the
// order of the two blocks' sums makes no difference.
template <typename Element, typename S>
struct DecodeFinish {
  const DecodeParams<Element>& p;
  uint32_t base;  // of shared memory

  // By threads 0 .. kThreads - 1 of a caller, once a pass's sums are there.
  template <int kThreads>
  __device__ void run(const DecodeCursor<Element, S>& work, int pass, int thread) const {
    constexpr int kHalf = S::kRows / 2;
    const int tokens = pass_tokens(pass), first = pass * S::kPassTokens;
    const int column = work.tile() * S::kRows;
    if (!work.shared()) {
      for (int i = thread; i < tokens * (S::kRows / 4); i += kThreads) {
        const int token = i / (S::kRows / 4), row = i % (S::kRows / 4) * 4;
        store(sum_of(token, row), first + token, column + row);
      }
      return;
    }
    const int mine = work.share.rank * kHalf, theirs = kHalf - mine;
    const uint32_t inbox = base + S::kReceivedAt + pass * S::kPassTokens * kHalf * 4;
    const uint32_t received = DecodeBarriers<S>{base + S::kBarriersAt}.received(pass);
    const uint32_t to = ptx::address_in_block(inbox, work.share.rank ^ 1);
    const uint32_t barrier = ptx::address_in_block(received, work.share.rank ^ 1);
    for (int i = thread; i < tokens * (kHalf / 4); i += kThreads) {
      ptx::send_to_block(to + i * 16, barrier,
                         sum_of(i / (kHalf / 4), theirs + i % (kHalf / 4) * 4));
    }
    ptx::mbarrier_wait(received, 0);
    for (int i = thread; i < tokens * (kHalf / 4); i += kThreads) {
      const int token = i / (kHalf / 4), row = mine + i % (kHalf / 4) * 4;
      float4 sum = sum_of(token, row);
      add(sum, ptx::load_shared<float4>(inbox + i * 16));
      store(sum, first + token, column + row);
    }
  }

  // Says how much run() of the other block will send. Before that block can.
  __device__ void expect() const {
    for (int pass = 0; pass < S::kPasses; ++pass) {
      ptx::mbarrier_arrive_expect(DecodeBarriers<S>{base + S::kBarriersAt}.received(pass),
                                  pass_tokens(pass) * S::kRows / 2 * 4);
    }
  }

 private:
  // How many tokens of a pass there are.
  __device__ int pass_tokens(int pass) const {
    return min(S::kPassTokens, max(p.m - pass * S::kPassTokens, 0));
  }

  static __device__ void add(float4& a, const float4& b) {
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
  }

  // Four rows, over the splits in order.
  __device__ float4 sum_of(int token, int row) const {
    const uint32_t at = base + S::kSumsAt + (token * S::kSumStride + row) * 4;
    float4 sum = ptx::load_shared<float4>(at);
#pragma unroll
    for (int split = 1; split < S::kSplits; ++split) {
      add(sum, ptx::load_shared<float4>(at + split * S::kPassTokens * S::kSumStride * 4));
    }
    return sum;
  }

  __device__ void store(const float4& sum, int token, int column) const {
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    Element* to = p.output + int64_t{token} * p.n + column;
    if (p.n % 4 == 0 && !p.bias) {
      if (column >= p.n) return;
      *reinterpret_cast<uint2*>(to) = {round_pair<Element>(sum.x, sum.y),
                                       round_pair<Element>(sum.z, sum.w)};
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= p.n) return;
      to[i] = from_float<Element>(values[i] + (p.bias ? to_float(p.bias[column + i]) : 0.f));
    }
  }
};

}  // namespace marlin::cuda::sm90
