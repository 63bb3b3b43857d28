// The end of a tile of a decode kernel (decode.cuh): adds the splits' sums and stores the outputs.
#pragma once

#include "cuda/element.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/sm90/decode_tiles.cuh"
#include "cuda/sm90/partials.cuh"

namespace marlin::cuda::sm90 {

// Of a tile that a pair shares, each block stores half of the rows, and sends its sums of the others to
// the other block, whose barrier counts the bytes. Addition of two numbers is commutative, so the
// order of the two blocks' sums makes no difference.
//
// Sums of half a tile and of a tile go through the same room in shared memory: a block sends the second once the
// other has read the first.
//
// Of a tile that blocks share over memory (S::kRuns), the block with the last stages stores all rows, and the
// others leave it their sums. It is compiled into kernels of its own: code that others never run made them 4 to
// 10% slower.
template <typename Element, typename S>
struct DecodeFinish {
  const DecodeParams<Element>& p;
  uint32_t base;  // of shared memory

  using Cursor = DecodeCursor<Element, S>;

  // By threads 0 .. kThreads - 1 of a caller, once a pass's sums are there.
  template <int kThreads>
  __device__ void run(const Cursor& work, int pass, int thread) const {
    if constexpr (S::kRuns) {
      if (work.sends()) {
        leave_partial<kThreads>(work, pass, thread);
      } else {
        store_gathered<kThreads>(work, pass, thread);
      }
    } else {
      store_or_exchange<kThreads>(work, pass, thread);
    }
  }

  // Before the block that stores a tile shared over memory needs the others' sums. By one thread.
  __device__ void await_partials(const Cursor& work) const {
    ptx::wait_for_earlier_kernels();  // which may have used the same flags
#pragma unroll 1
    for (int pass = 0; pass < S::kPasses; ++pass) {
#pragma unroll 1
      for (int sender = work.first_sender(); sender < work.block(); ++sender) {
        await_sums(flag_of(sender, pass));
      }
      ptx::mbarrier_arrive(received(pass));
    }
  }

  // Says how much run() of the other block will send. Before that block can.
  __device__ void expect() const {
    const Cursor work(p);  // what is shared comes first, if there is anything
    const DecodeBarriers<S> barriers{base + S::kBarriersAt};
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const Tokens tokens(p, work, pass);
      const int sums_of_row = max(tokens.end - tokens.begin, 0);
      ptx::mbarrier_arrive_expect(barriers.received(pass), sums_of_row * S::kRows / 2 * 4);
      if constexpr (S::kCutsTiles) {
        ptx::mbarrier_arrive_expect(barriers.received_half(), sums_of_row * 64 / 2 * 4);
      }
    }
  }

 private:
  static constexpr int kPartialLeft = 4;  // a barrier of the block

  __device__ uint32_t received(int pass) const {
    return DecodeBarriers<S>{base + S::kBarriersAt}.received(pass);
  }
  __device__ uint64_t* flag_of(int block, int pass) const {
    return p.partial_flags + block * S::kPasses + pass;
  }
  __device__ float4* partial_of(int block, int pass) const {
    return reinterpret_cast<float4*>(p.partials) +
           (block * S::kPasses + pass) * (S::kPassTokens * S::kRows / 4);
  }

  template <int kThreads>
  __device__ void leave_partial(const Cursor& work, int pass, int thread) const {
    constexpr int kEach = S::kRows / 4;  // of a token
    const Tokens tokens(p, work, pass);
    float4* to = partial_of(work.block(), pass) + thread;
    const int end = tokens.end * kEach - thread;
#pragma unroll 1
    for (int i = tokens.begin * kEach; i < end; i += kThreads) {
      to[i] = sum_of((i + thread) / kEach, (i + thread) % kEach * 4);
    }
    if constexpr (kThreads == 32) {
      __syncwarp();
    } else {
      ptx::barrier_sync<kPartialLeft, kThreads>();
    }
    if (thread == 0) flag_sums(flag_of(work.block(), pass));
  }

  // With what other blocks have left.
  template <int kThreads>
  __device__ void store_gathered(const Cursor& work, int pass, int thread) const {
    constexpr int kEach = S::kRows / 4;
    const Tokens tokens(p, work, pass);
    const int column = work.row();
    int first_sender = work.block();
    if (kThreads > 32 && work.gathers()) {  // then it is the block's last tile
      ptx::mbarrier_wait(received(pass), 0);
      first_sender = work.first_sender();
    }
    for (int i = tokens.begin * kEach + thread; i < tokens.end * kEach; i += kThreads) {
      const int token = i / kEach, row = i % kEach * 4;
      float4 sum = sum_of(token, row);
      if constexpr (kThreads > 32) {
#pragma unroll 1
        for (int sender = first_sender; sender < work.block(); ++sender) {
          add(sum, __ldcg(partial_of(sender, pass) + i));
        }
      }
      store(sum, tokens.first + token, column + row);
    }
  }

  template <int kThreads>
  __device__ void store_or_exchange(const Cursor& work, int pass, int thread) const {
    if (work.half()) {
      exchange<kThreads, 64>(work, pass, thread);
      return;
    }
    if (work.shared()) {
      exchange<kThreads, S::kRows>(work, pass, thread);
      return;
    }
    constexpr int kEach = S::kRows / 4;  // of a token
    const Tokens tokens(p, work, pass);
    const int column = work.row();
    for (int i = tokens.begin * kEach + thread; i < tokens.end * kEach; i += kThreads) {
      const int token = i / kEach, row = i % kEach * 4;
      store(sum_of(token, row), tokens.first + token, column + row);
    }
  }

  template <int kThreads, int kRows>
  __device__ void exchange(const Cursor& work, int pass, int thread) const {
    const Tokens tokens(p, work, pass);
    constexpr int kHalf = kRows / 2, kEach = kHalf / 4;
    const int column = work.row();
    const int begin = tokens.begin * kEach + thread, end = tokens.end * kEach;
    const int mine = work.share.rank * kHalf, theirs = kHalf - mine, other = work.share.rank ^ 1;
    const uint32_t inbox = base + S::kReceivedAt + pass * S::kPassTokens * S::kRows / 2 * 4;
    const uint32_t to = ptx::address_in_block(inbox, other);
    const DecodeBarriers<S> barriers{base + S::kBarriersAt};
    const uint32_t received = work.half() ? barriers.received_half() : barriers.received(pass);
    const uint32_t barrier = ptx::address_in_block(received, other);
    if (work.shared_before()) ptx::mbarrier_wait(barriers.room_free(), 0);
    for (int i = begin; i < end; i += kThreads) {
      ptx::send_to_block(to + i * 16, barrier, sum_of(i / kEach, theirs + i % kEach * 4));
    }
    ptx::mbarrier_wait(received, 0);
    for (int i = begin; i < end; i += kThreads) {
      const int token = i / kEach, row = mine + i % kEach * 4;
      float4 sum = sum_of(token, row);
      add(sum, ptx::load_shared<float4>(inbox + i * 16));
      store(sum, tokens.first + token, column + row);
    }
    if (work.shares_next()) {
      ptx::mbarrier_arrive_in_block(ptx::address_in_block(barriers.room_free(), other));
    }
  }

  // Those of a pass that are stored: `first` + begin ..< end.
  struct Tokens {
    int first, begin, end;

    __device__ Tokens(const DecodeParams<Element>& p, const Cursor& work, int pass)
        : first(work.first_token() + pass * S::kPassTokens),
          begin(S::kTile.many_tokens() ? max(work.token() - first, 0) : 0),
          end(min(S::kPassTokens, p.m - first)) {}
  };

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
