// From a GEMM's arguments to kernel launches: which family of kernels, and its plan.
#include <atomic>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/attributes.h"
#include "cuda/check.h"
#include "cuda/element.cuh"
#include "cuda/sm80/launch.cuh"
#include "plan/numbering.h"
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
    if (device.wgmma) device.pairs = sm90::pairs_at_once();
#endif
    devices[index] = device;  // only now, since any of the questions may throw
  }
  return devices[index];
}

// See force_plan.
std::atomic<int> forced_kernel = -1, forced_sm_count = 0;
std::atomic<bool> forced_shares = false;

// The kernel of a number: one of these, or none where it is -1.
struct NumberedKernel {
  const plan::Kernel* sm80 = nullptr;
  const plan::DecodeKernel* decode = nullptr;
  const plan::PrefillKernel* prefill = nullptr;
  bool sparse = false;

  explicit NumberedKernel(int number) {
    if (number < 0) return;
    plan::for_each_table([&](const auto& table) {
      for (const auto& kernel : table) {
        if (number-- != 0) continue;
        sparse = kernel.tile.sparse;
        point_to(kernel);
      }
    });
  }

 private:
  void point_to(const plan::Kernel& kernel) { sm80 = &kernel; }
  void point_to(const plan::DecodeKernel& kernel) { decode = &kernel; }
  void point_to(const plan::PrefillKernel& kernel) { prefill = &kernel; }
};

// Calls `run` with the plan of the kernels that will do it.
template <typename F>
decltype(auto) with_plan(const Gemm& args, F&& run) {
  const bool sparse = args.meta != nullptr;
  plan::Problem problem{args.m, args.n, args.k, args.group_size, current_device(), sparse};
  if (const int sm_count = forced_sm_count) {
    problem.device.sm_count = sm_count;
    problem.device.pairs = 0;
  }
  const int number = forced_kernel;
  const NumberedKernel forced(number);
  if (number >= 0 && forced.sparse != sparse) {
    throw std::runtime_error("marlin: force_plan: kernel " + std::to_string(number) + " is for " +
                             (sparse ? "dense" : "2:4 sparse") + " weights, this one is " +
                             (sparse ? "2:4 sparse" : "dense"));
  }
  if (forced.sm80) return run(plan::plan_with(*forced.sm80, problem));
#ifdef MARLIN_WITH_SM90
  if (problem.device.wgmma) {
    if (forced.prefill) {
      return run(plan::prefill_plan_with(*forced.prefill, forced_shares, problem));
    }
    if (forced.decode && forced.decode->tile.holds(args.m)) {
      return run(plan::decode_plan_with(*forced.decode, forced_shares, problem));
    }
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

void force_plan(int id, int sm_count, bool shares) {
  const auto check_range = [](const char* name, int value, int least, int most) {
    if (value >= least && value <= most) return;
    throw std::runtime_error("marlin: force_plan: " + std::string(name) + ": got " +
                             std::to_string(value) + "; it must be " + std::to_string(least) +
                             " to " + std::to_string(most));
  };
  check_range("id", id, -1, plan::kernel_count() - 1);
  check_range("sms", sm_count, 0, std::numeric_limits<int>::max());
  forced_kernel = id;
  forced_sm_count = sm_count;
  forced_shares = shares;
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
