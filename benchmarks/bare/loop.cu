// What the inner loop of the decode kernels can do: warpgroups take turns at stages, convert, multiply
// and scale, with everything in shared memory, or with a ring that one warp fills from memory. Cycles
// are of one multiprocessor, for 16 columns of 64 rows; the clock is that under this load, after about
// a quarter of a second, when the power limit shows.
#include "bare.h"

#include "cuda/element.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "layout/packed.h"

namespace {

using namespace marlin;
using bare::check;
using Element = __half;
using Format = layout::Fp16;

// What the producer copies: nothing, weights, or activations too.
enum class Source { kShared, kMemory, kMemoryAndL2 };

// Instructions for 8 weights.
enum Conversion { kNone = 0, kNoSubtraction = 5, kIntegers = 9, kScaled = 13 };

struct Params {
  const char *weights, *activations;
  int64_t weight_bytes;  // walked over again and again
  int stages, stages_of_ring;
  int64_t* cycles;
  float* sink;
};

template <int kConversion>
__device__ __forceinline__ void convert(uint32_t (&a)[4], uint32_t word,
                                        const uint32_t (&subtrahend)[2]) {
  if constexpr (kConversion >= kIntegers) {
    cuda::convert<Element>(a, word, subtrahend);
    const uint32_t scale[2] = {0x2c002c00, 0x2c012c01};
    if constexpr (kConversion == kScaled) cuda::multiply_pairs<Element>(a, scale);
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t rotated =
          Format::rotate(r) == 0 ? word : __funnelshift_r(word, word, Format::rotate(r));
      a[r] = kConversion == kNone ? word : ptx::and_or(rotated, Format::mask(r), Format::magic(r));
    }
  }
}

template <int kTokens, int kConversion, int kWarpgroups, int kStageBlocks, Source kSource>
__global__ void __launch_bounds__((kWarpgroups + 1) * 128, 1) loop_kernel(Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kInputBytes = kTokens * kStageBlocks * 128;
  constexpr int kWeightBytes = kStageBlocks * layout::kBytesPerBlock;
  constexpr int kScalesAt = kInputBytes + kWeightBytes;
  constexpr int kStageBytes = (kScalesAt + 512 + 1023) / 1024 * 1024;
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[64];
  const uint32_t full = ptx::shared_address(barriers), empty = full + 8 * 32;
  const int words = p.stages_of_ring * kStageBytes / 4;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(shared)[i] = i * 2654435761u & 0x3bff3bffu;  // finite as fp16
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages_of_ring; ++i) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 128);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::fence_before_copies();
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const uint32_t base = __shfl_sync(0xffffffffu, ptx::shared_address(shared), 0);
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int64_t begin = clock64();

  if (warpgroup == kWarpgroups) {  // its first warp is the producer
    if (kWarpgroups == 4) ptx::give_registers<24>();
    if (kSource == Source::kShared || thread >= 32) return;
    int slot = 0, parity = 1;
    const char* from = p.weights + int64_t{blockIdx.x} * kWeightBytes;
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_wait(empty + 8 * slot, parity);
      if (ptx::elect_one()) {
        const uint32_t to = base + slot * kStageBytes, barrier = full + 8 * slot;
        const bool input = kSource == Source::kMemoryAndL2;
        ptx::mbarrier_arrive_expect(barrier, kWeightBytes + (input ? kInputBytes : 0));
        ptx::bulk_copy(to + kInputBytes, from, kWeightBytes, barrier);
        if (input) {
          const int64_t at = int64_t{i % (8192 / 64 / kStageBlocks)} * kInputBytes;
          ptx::bulk_copy(to, p.activations + at, kInputBytes, barrier);
        }
      }
      __syncwarp();
      from += int64_t{gridDim.x} * kWeightBytes;
      if (from > p.weights + p.weight_bytes - kWeightBytes) {
        from = p.weights + int64_t{blockIdx.x} * kWeightBytes;
      }
      if (++slot == p.stages_of_ring) slot = 0, parity ^= 1;
    }
    return;
  }

  if (kWarpgroups == 4) ptx::take_registers<112>();
  const uint64_t descriptor = ptx::wgmma_descriptor_of(ptx::wgmma_descriptor_low(base));
  const uint32_t subtrahend[2] = {layout::subtrahend<Format>(8, 0),
                                  layout::subtrahend<Format>(8, 1)};
  float sums[kTokens / 2] = {};
  int slot = warpgroup, parity = 0;
#pragma unroll 1
  for (int i = warpgroup; i < p.stages; i += kWarpgroups) {
    if (kSource != Source::kShared) ptx::mbarrier_wait(full + 8 * slot, parity);
    const uint32_t stage = base + slot * kStageBytes;
    const uint64_t b = descriptor + static_cast<uint32_t>(slot * kStageBytes) / 16;
#pragma unroll
    for (int half = 0; half < kStageBlocks / 2; ++half) {
      const uint32_t at = stage + kInputBytes + half * 2 * layout::kBytesPerBlock + thread * 16;
      const uint4 word[2] = {ptx::load_shared<uint4>(at),
                             ptx::load_shared<uint4>(at + layout::kBytesPerBlock)};
      const uint32_t scales = stage + kScalesAt + half % 2 * 128 + thread / 4 * 2;
      const float scale[2] = {cuda::to_float(ptx::load_shared<Element>(scales)),
                              cuda::to_float(ptx::load_shared<Element>(scales + 64))};
      float partial[kTokens / 2];
      uint32_t a[8][4];
#pragma unroll
      for (int batch = 0; batch < 8; batch += 4) {
#pragma unroll
        for (int s = batch; s < batch + 4; ++s) {
          convert<kConversion>(a[s], (&word[s / 4].x)[s % 4], subtrahend);
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int s = batch; s < batch + 4; ++s) {
          const int offset = (half * 2 + s / 4) * kTokens * 8 + s % 4 * 2;
          ptx::wgmma_m64k16<Element, kTokens>(partial, a[s], b + static_cast<uint64_t>(offset),
                                              s > 0);
        }
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int j = 0; j < kTokens / 2; ++j) {
        asm volatile("" : "+f"(partial[j])::"memory");
        sums[j] = fmaf(partial[j], scale[j / 2 % 2], sums[j]);
      }
    }
    if (kSource != Source::kShared) ptx::mbarrier_arrive(empty + 8 * slot);
    slot += kWarpgroups;
    if (slot >= p.stages_of_ring) slot -= p.stages_of_ring, parity ^= 1;
  }
  ptx::barrier_sync<1, kWarpgroups * 128>();
  const int64_t end = clock64();
  float total = 0;
  for (const float sum : sums) total += sum;
  p.sink[blockIdx.x * blockDim.x + threadIdx.x] = total;
  if (threadIdx.x == 0) p.cycles[blockIdx.x] = end - begin;
#endif
}

template <int kTokens, int kConversion, int kWarpgroups, int kStageBlocks, Source kSource>
void measure(Params p) {
  const auto kernel = loop_kernel<kTokens, kConversion, kWarpgroups, kStageBlocks, kSource>;
  constexpr int kShared = 200 * 1024;
  constexpr int kStageBytes =
      (kTokens * kStageBlocks * 128 + kStageBlocks * layout::kBytesPerBlock + 512 + 1023) / 1024 *
      1024;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
        "cudaFuncSetAttribute");
  p.stages_of_ring = std::min(32, kShared / kStageBytes) / kWarpgroups * kWarpgroups;
  p.stages = 27200 / kStageBlocks / kWarpgroups * kWarpgroups;
  const auto launches = [&](int count) {
    for (int i = 0; i < count; ++i) {
      kernel<<<bare::kMultiprocessors, (kWarpgroups + 1) * 128, p.stages_of_ring * kStageBytes>>>(
          p);
    }
    check(cudaGetLastError(), "loop_kernel");
  };
  launches(160);  // until the clock has settled
  const double us = 1e3 * bare::time_ms(nullptr, [&] { launches(120); }) / 120;
  std::vector<int64_t> cycles(bare::kMultiprocessors);
  check(cudaMemcpy(cycles.data(), p.cycles, cycles.size() * 8, cudaMemcpyDeviceToHost), "copy");
  const double steps = 4.0 * p.stages * kStageBlocks;
  const double mean = std::accumulate(cycles.begin(), cycles.end(), 0.0) / cycles.size();
  constexpr const char* kNames[] = {"shared memory", "memory", "memory and L2"};
  std::printf(
      "%2d tokens, %2d instructions, %d warpgroups, %d blocks a stage, %2d stages, from %-13s: "
      "%6.2f "
      "cycles, %5.2f TB/s, about %4.0f MHz\n",
      kTokens, kConversion, kWarpgroups, kStageBlocks, p.stages_of_ring,
      kNames[static_cast<int>(kSource)], mean / steps, 512e-6 * bare::kMultiprocessors * steps / us,
      mean / us);
}

template <int kTokens, int kStageBlocks>
void measure_all(const Params& p) {
  measure<kTokens, kNone, 4, kStageBlocks, Source::kShared>(p);
  measure<kTokens, kNoSubtraction, 4, kStageBlocks, Source::kShared>(p);
  measure<kTokens, kIntegers, 4, kStageBlocks, Source::kShared>(p);
  measure<kTokens, kIntegers, 4, kStageBlocks, Source::kMemory>(p);
  measure<kTokens, kNoSubtraction, 4, kStageBlocks, Source::kMemoryAndL2>(p);
  measure<kTokens, kIntegers, 4, kStageBlocks, Source::kMemoryAndL2>(p);
  measure<kTokens, kScaled, 4, kStageBlocks, Source::kMemoryAndL2>(p);
  measure<kTokens, kIntegers, 3, kStageBlocks, Source::kMemoryAndL2>(p);
}

}  // namespace

int main() {
  Params p{};
  p.weight_bytes = int64_t{900} << 20;
  p.weights = bare::random_bytes(static_cast<size_t>(p.weight_bytes));
  p.activations = reinterpret_cast<const char*>(bare::random_activations(size_t{64} * 8192));
  check(cudaMalloc(&p.cycles, bare::kMultiprocessors * 8), "cudaMalloc");
  check(cudaMalloc(&p.sink, bare::kMultiprocessors * 1024 * 4), "cudaMalloc");
  measure_all<8, 4>(p);
  measure_all<16, 4>(p);
  measure_all<32, 4>(p);
  measure_all<64, 2>(p);
}
