// What other instructions cost beside `wgmma`: every warp of some warpgroups issues so many of one kind, then a
// multiplication of 64 rows, 16 columns and N tokens with weights from registers, and so on; nothing is copied.
// Cycles are of one multiprocessor, for one multiplication; the tensor core alone takes N / 2.
#include "bare.h"

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace marlin;
using bare::check;

// What the instructions are: of one pipe, logic or half precision, or of both in turn.
enum class Kind { kLogic, kHalf, kBoth };

template <Kind kKind>
__device__ __forceinline__ void issue(uint32_t& x, uint32_t y, int i) {
  const bool logic = kKind == Kind::kLogic || (kKind == Kind::kBoth && i % 2 == 0);
  if (logic) {
    asm volatile("lop3.b32 %0, %0, 0x3c003c, %1, 0xEA;" : "+r"(x) : "r"(y));
  } else {
    asm volatile("sub.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  }
}

constexpr int kTokensBytes = 256 * 128;  // 64 columns of up to 256 tokens

template <int kTokens, int kWarpgroups, int kInstructions, Kind kKind>
__global__ void __launch_bounds__(128 * kWarpgroups, 1)
    issue_kernel(int64_t* cycles, float* sink, int rounds) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = __shfl_sync(0xffffffffu, ptx::shared_address(shared), 0);
  for (uint32_t i = threadIdx.x; i < kTokensBytes / 4; i += 128 * kWarpgroups) {
    ptx::store_shared(base + 4 * i, (i * 0x9e3779b9u & 0x83ff83ffu) | 0x3c003c00u);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  float sums[kTokens / 2] = {};
  uint32_t a[4][4], x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    x[i] = threadIdx.x * (i + 1);
    a[i / 4][i % 4] = (x[i] * 0x9e3779b9u & 0x83ff83ffu) | 0x3c003c00u;
  }
  const uint64_t b = ptx::wgmma_descriptor_of(ptx::wgmma_descriptor_low(base));
  const int64_t begin = clock64();
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) issue<kKind>(x[i % 16], 0x3c003c00u, i);
      ptx::wgmma_fence();
      ptx::wgmma_m64k16<__half, kTokens>(sums, a[step], b + step * 2, true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<3>();
    }
  }
  ptx::wgmma_wait<0>();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    asm volatile("" : "+f"(sums[i])::"memory");
    sum += sums[i];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += static_cast<float>(x[i]);
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
#endif
}

template <int kTokens, int kWarpgroups, int kInstructions, Kind kKind>
double cycles_of(int64_t* cycles, float* sink) {
  constexpr int kRounds = 500;
  const auto kernel = issue_kernel<kTokens, kWarpgroups, kInstructions, kKind>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTokensBytes),
        "cudaFuncSetAttribute");
  std::vector<int64_t> host(bare::kMultiprocessors);
  for (int i = 0; i < 2; ++i) {  // the first loads the kernel
    kernel<<<bare::kMultiprocessors, 128 * kWarpgroups, kTokensBytes>>>(cycles, sink, kRounds);
    check(cudaMemcpy(host.data(), cycles, host.size() * 8, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  const double all = static_cast<double>(std::accumulate(host.begin(), host.end(), int64_t{0}));
  return all / bare::kMultiprocessors / (kRounds * 4 * kWarpgroups);
}

template <int kTokens, int kWarpgroups>
void measure(int64_t* cycles, float* sink) {
  const auto row = [&]<Kind kKind>(const char* name) {
    std::printf("%4d tokens, %d warpgroups, %-6s", kTokens, kWarpgroups, name);
    std::printf("  0: %6.1f", cycles_of<kTokens, kWarpgroups, 0, kKind>(cycles, sink));
    std::printf("  8: %6.1f", cycles_of<kTokens, kWarpgroups, 8, kKind>(cycles, sink));
    std::printf("  16: %6.1f", cycles_of<kTokens, kWarpgroups, 16, kKind>(cycles, sink));
    std::printf("  24: %6.1f cycles\n", cycles_of<kTokens, kWarpgroups, 24, kKind>(cycles, sink));
  };
  row.template operator()<Kind::kLogic>("logic");
  row.template operator()<Kind::kHalf>("half");
  row.template operator()<Kind::kBoth>("both");
}

}  // namespace

int main() {
  int64_t* cycles = nullptr;
  float* sink = nullptr;
  check(cudaMalloc(&cycles, bare::kMultiprocessors * 8), "cudaMalloc");
  check(cudaMalloc(&sink, bare::kMultiprocessors * 1024 * 4), "cudaMalloc");
  measure<32, 4>(cycles, sink);
  measure<64, 4>(cycles, sink);
  measure<96, 2>(cycles, sink);
  measure<96, 3>(cycles, sink);
  measure<128, 2>(cycles, sink);
  measure<256, 2>(cycles, sink);
}
