// From a GEMM's arguments to kernel launches: which family of kernels, and its plan.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "cuda/attributes.h"
#include "cuda/check.h"
#include "cuda/element.cuh"
#include "cuda/sm80/launch.cuh"
#include "plan/decode.h"
#include "plan/plan.h"
#include "plan/prefill.h"
#ifdef MARLIN_WITH_SM90
#include "cuda/sm90/launch.cuh"
#endif

namespace marlin::cuda {
namespace {

using sm80::launch;
using sm80::scratch_of;
#ifdef MARLIN_WITH_SM90
using sm90::launch;
using sm90::scratch_of;
#endif

// What the plan needs to know of the current device; asked of the driver once per device.
plan::Device current_device() {
  static std::mutex mutex;
  static std::vector<plan::Device> devices;
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  if (devices.size() <= static_cast<size_t>(index)) devices.resize(index + 1);
  if (devices[index].sm == 0) {
    plan::Device device;
    int major = 0, minor = 0;
    const auto ask = [&](int& value, cudaDeviceAttr attribute) {
      check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
    };
    ask(major, cudaDevAttrComputeCapabilityMajor);
    ask(minor, cudaDevAttrComputeCapabilityMinor);
    ask(device.sm_count, cudaDevAttrMultiProcessorCount);
    ask(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.sm = major * 10 + minor;
#ifdef MARLIN_WITH_SM90
    device.wgmma = device.sm == 90;
    if (device.wgmma) device.clusters = sm90::clusters_at_once();
#endif
    devices[index] = device;  // only now, since any of the questions may throw
  }
  return devices[index];
}

std::atomic<int> forced_kernel = -1, forced_sm_count = 0, forced_cluster = 0;  // see force_plan

int kernel_count() {
  return static_cast<int>(plan::kernels().size() + plan::decode_kernels().size() +
                          plan::prefill_kernels().size() + plan::sparse_kernels().size());
}

// Calls `run` with the plan of the kernels that will do it.
template <typename F>
decltype(auto) with_plan(const Gemm& args, F&& run) {
  const bool sparse = args.meta != nullptr;
  plan::Problem problem{args.m, args.n, args.k, args.group_size, current_device(), sparse};
  if (const int sm_count = forced_sm_count) {
    problem.device.sm_count = sm_count;
    problem.device.clusters = {};
  }
  const int forced = forced_kernel, cluster = std::max<int>(forced_cluster, 1);
  const int decode = forced - static_cast<int>(plan::kernels().size());
  const int prefill = decode - static_cast<int>(plan::decode_kernels().size());
  const int sm80_24 = prefill - static_cast<int>(plan::prefill_kernels().size());
  if (forced >= 0 && (sm80_24 >= 0) != sparse) {
    throw std::runtime_error("marlin: force_plan: kernel " + std::to_string(forced) + " is for " +
                             (sparse ? "dense" : "2:4 sparse") + " weights, this one is " +
                             (sparse ? "2:4 sparse" : "dense"));
  }
  if (sm80_24 >= 0) return run(plan::plan_with(plan::sparse_kernels()[sm80_24], problem));
  if (forced >= 0 && decode < 0) return run(plan::plan_with(plan::kernels()[forced], problem));
#ifdef MARLIN_WITH_SM90
  if (problem.device.wgmma) {
    if (prefill >= 0) {
      return run(plan::prefill_plan_with(plan::prefill_kernels()[prefill], cluster, problem));
    }
    if (decode >= 0 && args.m <= plan::decode_kernels()[decode].tile.tokens) {
      const plan::DecodeKernel& kernel = plan::decode_kernels()[decode];
      return run(plan::decode_plan_with(kernel, std::min(cluster, 2), problem));
    }
    // None of these takes 2:4 sparse weights, so far.
    if (const auto chosen = plan::select_decode(problem)) return run(*chosen);
    if (const auto chosen = plan::select_prefill(problem)) return run(*chosen);
  }
#endif
  return run(plan::select(problem));
}

}  // namespace

int64_t gemm_workspace_bytes(const Gemm& args) {
  if (args.m == 0 || args.n == 0) return 0;
  return with_plan(args, [&](const auto& plan) { return scratch_of(args, plan).bytes(); });
}

void force_plan(int id, int sm_count, int cluster) {
  if (id < -1 || id >= kernel_count() || sm_count < 0 || cluster < 0 ||
      cluster > plan::Device::kLargestCluster) {
    throw std::runtime_error(
        "marlin: force_plan: no such kernel, number of multiprocessors or cluster");
  }
  forced_kernel = id;
  forced_sm_count = sm_count;
  forced_cluster = cluster;
}

void gemm(const Gemm& args, void* workspace, void* stream) {
  if (args.m == 0 || args.n == 0) return;
  with_plan(args, [&](const auto& plan) {
    dispatch(args.dtype, [&](auto* element) {
      launch<std::remove_pointer_t<decltype(element)>>(args, plan, workspace,
                                                       static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace marlin::cuda
