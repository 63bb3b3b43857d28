// What memory and L2 give a ring of bulk copies: every block streams weights of its own from memory and
// the same activations from L2, and computes nothing. Columns: the arguments, us a launch, and TB/s of
// weights alone and of weights and activations.
#include "bare.h"

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/sm90/tensor_map.h"

namespace {

using namespace marlin;
using bare::check;

constexpr int kStageColumns = 256, kStageBlocks = kStageColumns / 64;

struct Params {
  CUtensorMap input;
  const char* weights;
  int weight_bytes, input_bytes;      // of a stage
  int stages, stages_of_ring;         // of a block
  int stages_of_row, first_stage_by;  // of the activations; a block starts so many further on
};

__global__ void __launch_bounds__(96, 1) stream_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[64];
  const uint32_t full = ptx::shared_address(barriers), empty = full + 8 * 32;
  const uint32_t base = ptx::shared_address(shared);
  const int stage_bytes = (p.weight_bytes + p.input_bytes + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages_of_ring; ++i) {
      ptx::mbarrier_init(full + 8 * i, p.input_bytes > 0 ? 2 : 1);
      ptx::mbarrier_init(empty + 8 * i, 1);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::let_next_kernel_start();
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp > 0) ptx::wait_for_earlier_kernels();
  if (warp == 1 && p.input_bytes == 0) return;
  const char* from = p.weights + size_t{blockIdx.x} * p.stages * p.weight_bytes;
  int slot = 0, parity = warp < 2, at = static_cast<int>(blockIdx.x) * p.first_stage_by;
  for (int i = 0; i < p.stages; ++i) {
    if (warp == 2) {  // consumes
      ptx::mbarrier_wait(full + 8 * slot, parity);
      __syncwarp();
      if (ptx::elect_one()) ptx::mbarrier_arrive(empty + 8 * slot);
    } else {
      ptx::mbarrier_wait(empty + 8 * slot, parity);
      const uint32_t to = base + slot * stage_bytes;
      if (ptx::elect_one()) {
        ptx::mbarrier_arrive_expect(full + 8 * slot, warp ? p.input_bytes : p.weight_bytes);
        if (warp == 0) {
          ptx::bulk_copy(to + p.input_bytes, from, p.weight_bytes, full + 8 * slot);
        } else {
          ptx::tensor_copy(to, p.input, 0, 0, at % p.stages_of_row * kStageBlocks, full + 8 * slot);
        }
      }
      __syncwarp();
    }
    from += p.weight_bytes;
    ++at;
    if (++slot == p.stages_of_ring) slot = 0, parity ^= 1;
  }
#endif
}

void measure(const char* weights, size_t pool, const __half* activations, cudaStream_t stream,
             double megabytes, int rows, int tokens, int shared_kb, int first_stage_by) {
  constexpr int kColumns = 8192;
  Params p{};
  p.weight_bytes = rows * kStageColumns / 2;
  p.input_bytes = tokens * kStageColumns * 2;
  p.stages =
      static_cast<int>(std::lround(megabytes * 1e6 / bare::kMultiprocessors / p.weight_bytes));
  const int stage_bytes = (p.weight_bytes + p.input_bytes + 1023) / 1024 * 1024;
  p.stages_of_ring = std::min(32, shared_kb * 1024 / stage_bytes);
  p.stages_of_row = kColumns / kStageColumns;
  p.first_stage_by = first_stage_by;
  if (tokens > 0) {
    const auto m = static_cast<uint64_t>(tokens);
    p.input = cuda::sm90::tensor_map(cuda::sm90::MapType::kFloat16, activations,
                                     {{64, m, kColumns / 64}}, {{kColumns * 2, 128}},
                                     {{64, static_cast<uint32_t>(tokens), kStageBlocks}}, true);
  }
  const size_t bytes = size_t{bare::kMultiprocessors} * p.stages * p.weight_bytes;
  const size_t copies = std::max<size_t>(2, std::min(pool / bytes, size_t(400e6 / bytes) + 1));
  cudaGraph_t graph;
  cudaGraphExec_t walk;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  for (size_t i = 0; i < copies; ++i) {
    p.weights = weights + i * bytes;
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = bare::kMultiprocessors;
    config.blockDim = 96;
    config.dynamicSmemBytes = static_cast<size_t>(p.stages_of_ring) * stage_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, stream_kernel, p), "cudaLaunchKernelEx");
  }
  check(cudaStreamEndCapture(stream, &graph), "end capture");
  check(cudaGraphInstantiate(&walk, graph, 0), "cudaGraphInstantiate");
  const int walks = std::max(3, static_cast<int>(2e10 / (bytes * copies)));
  std::vector<double> us;
  for (int window = 0; window < 6; ++window) {
    const double ms = bare::time_ms(stream, [&] {
      for (int i = 0; i < walks; ++i) check(cudaGraphLaunch(walk, stream), "cudaGraphLaunch");
    });
    if (window > 0) us.push_back(1e3 * ms / walks / copies);
  }
  std::nth_element(us.begin(), us.begin() + us.size() / 2, us.end());
  const double time = us[us.size() / 2], weight_rate = bytes / time / 1e6;
  std::printf(
      "%6.1f MB, %3d rows, %2d tokens, %3d KB, starts %d apart: %7.2f us  %5.2f  %5.2f TB/s\n",
      bytes / 1e6, rows, tokens, shared_kb, first_stage_by, time, weight_rate,
      weight_rate * (p.weight_bytes + p.input_bytes) / p.weight_bytes);
  check(cudaGraphExecDestroy(walk), "cudaGraphExecDestroy");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
}

}  // namespace

int main() {
  constexpr size_t kPool = size_t{1} << 30;
  const char* weights = bare::random_bytes(kPool);
  const __half* activations = bare::random_activations(size_t{64} * 8192);
  check(
      cudaFuncSetAttribute(stream_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 224 * 1024),
      "cudaFuncSetAttribute");
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  for (const double megabytes : {235.0, 33.8, 8.65}) {
    for (const int rows : {64, 128}) {
      for (const int shared_kb : {200, 112}) {
        measure(weights, kPool, activations, stream, megabytes, rows, 0, shared_kb, 0);
      }
      for (const int tokens : {16, 32, 64}) {
        for (const int by : {0, 5}) {
          measure(weights, kPool, activations, stream, megabytes, rows, tokens, 200, by);
        }
      }
    }
  }
}
