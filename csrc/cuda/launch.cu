// From a GEMM's arguments to kernel launches: the plan, the scratch, the launches, in this order.
#include <algorithm>
#include <bit>
#include <mutex>
#include <vector>

#include "cuda/check.h"
#include "cuda/element.cuh"
#include "cuda/gather.cuh"
#include "cuda/sm80/gemm.cuh"
#include "cuda/sm80/instances.h"
#include "cuda/sm80/reduce.cuh"
#include "plan/plan.h"

namespace marlin::cuda {
namespace {

// What the plan needs to know of the current device; asked of the driver once per device.
plan::Device current_device() {
  static std::mutex mutex;
  static std::vector<plan::Device> devices;
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  if (devices.size() <= static_cast<size_t>(index)) devices.resize(index + 1);
  plan::Device& device = devices[index];
  if (device.sm == 0) {
    int major = 0, minor = 0;
    const auto ask = [&](int& value, cudaDeviceAttr attribute) {
      check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
    };
    ask(major, cudaDevAttrComputeCapabilityMajor);
    ask(minor, cudaDevAttrComputeCapabilityMinor);
    ask(device.sm_count, cudaDevAttrMultiProcessorCount);
    ask(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.sm = major * 10 + minor;
  }
  return device;
}

plan::Plan plan_of(const Gemm& args) {
  return plan::select({args.m, args.n, args.k, args.group_size, current_device()});
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The scratch of one call, in order: aligned copies of what is not aligned (or not in the packed
// order), then the partial sums. The copies' sizes are 0 where the caller's tensors will do.
struct Scratch {
  int64_t input_columns, scale_columns;                    // of a padded row
  int64_t input = 0, scales = 0, zeros = 0, partials = 0;  // bytes

  Scratch(const Gemm& args, const plan::Plan& plan)
      : input_columns(round_up(args.k, 8)), scale_columns(round_up(args.n, 16)) {
    const int64_t groups = layout::ceil_div(args.k, args.group_size);
    if (args.perm || args.k % 8 != 0 || args.input_stride % 8 != 0 || !aligned(args.input)) {
      input = round_up(args.m * input_columns * 2, 256);
    }
    if (args.n % 16 != 0 || !aligned(args.scales) || !aligned(args.zeros)) {
      scales = round_up(groups * scale_columns * 2, 256);
      zeros = args.zeros ? round_up(groups * scale_columns, 256) : 0;
    }
    partials = plan.workspace_bytes;
  }

  int64_t bytes() const { return input + scales + zeros + partials; }
};

template <typename Value>
void gather(const Value* source, int64_t stride, const int32_t* perm, void* out, int64_t rows,
            int64_t columns, int64_t padded, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(layout::ceil_div(padded, kGatherThreads)),
                  static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  gather_kernel<Value>
      <<<grid, kGatherThreads, 0, stream>>>(source, stride, perm, static_cast<Value*>(out), rows,
                                            static_cast<int>(columns), static_cast<int>(padded));
  check(cudaGetLastError(), "gather_kernel");
}

// The kernel's arguments; queues the copies that they need.
template <typename Element>
sm80::Params<Element> params_of(const Gemm& args, const plan::Plan& plan, void* workspace,
                                cudaStream_t stream) {
  const Scratch scratch(args, plan);
  auto* at = static_cast<char*>(workspace);
  sm80::Params<Element> p{};
  p.groups = static_cast<int>(layout::ceil_div(args.k, args.group_size));
  p.group_shift = p.groups == 1 ? 31 : std::countr_zero(static_cast<uint64_t>(args.group_size));
  p.scale_shift = std::min(p.group_shift, std::countr_zero(unsigned(plan.kernel.tile.warp_k())));

  p.input = static_cast<const Element*>(args.input);
  p.input_stride = args.input_stride;
  if (scratch.input) {
    gather(p.input, args.input_stride, args.perm, at, args.m, args.k, scratch.input_columns,
           stream);
    p.input = reinterpret_cast<const Element*>(at);
    p.input_stride = scratch.input_columns;
    at += scratch.input;
  }
  p.scales = static_cast<const Element*>(args.scales);
  p.zeros = args.zeros;
  p.scale_stride = static_cast<int>(args.n);
  if (scratch.scales) {
    const auto copy = [&](auto*& source, int64_t bytes) {
      gather(source, args.n, nullptr, at, p.groups, args.n, scratch.scale_columns, stream);
      source = reinterpret_cast<std::remove_reference_t<decltype(source)>>(at);
      at += bytes;
    };
    copy(p.scales, scratch.scales);
    if (p.zeros) copy(p.zeros, scratch.zeros);
    p.scale_stride = static_cast<int>(scratch.scale_columns);
  }
  p.partials = reinterpret_cast<float*>(at);
  p.qweight = args.qweight;
  p.bias = static_cast<const Element*>(args.bias);
  p.output = static_cast<Element*>(args.output);
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(args.n);
  p.k = static_cast<int>(scratch.input_columns);
  p.n_blocks = static_cast<int>(layout::ceil_div(args.n, layout::kBlock));
  p.k_blocks = static_cast<int>(layout::ceil_div(args.k, layout::kBlock));
  p.partition = plan.partition;
  return p;
}

template <typename Element>
void launch(const Gemm& args, const plan::Plan& plan, void* workspace, cudaStream_t stream) {
  const auto& tile = plan.kernel.tile;
  const auto& instance = sm80::instances<Element>()[plan.kernel.id];
  const auto params = params_of<Element>(args, plan, workspace, stream);
  // Set at every launch: it is cheap, it is per device, and a cache of it would be state to keep.
  check(cudaFuncSetAttribute(instance.gemm, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             tile.shared_bytes()),
        "cudaFuncSetAttribute");
  instance.gemm<<<static_cast<unsigned>(plan.partition.blocks), tile.threads(), tile.shared_bytes(),
                  stream>>>(params);
  check(cudaGetLastError(), "gemm_kernel");
  if (!plan.partition.splits_tiles()) return;
  const int64_t tokens = std::min<int64_t>(args.m, tile.tokens);
  const dim3 grid(static_cast<unsigned>(plan.partition.tiles()),
                  static_cast<unsigned>(layout::ceil_div(tokens, sm80::kReduceTokens)));
  instance.reduce<<<grid, dim3(tile.rows(), sm80::kReduceTokens), 0, stream>>>(params);
  check(cudaGetLastError(), "reduce_kernel");
}

}  // namespace

int64_t gemm_workspace_bytes(const Gemm& args) { return Scratch(args, plan_of(args)).bytes(); }

void gemm(const Gemm& args, void* workspace, void* stream) {
  if (args.m == 0 || args.n == 0) return;
  const plan::Plan plan = plan_of(args);
  dispatch(args.dtype, [&](auto* element) {
    launch<std::remove_pointer_t<decltype(element)>>(args, plan, workspace,
                                                     static_cast<cudaStream_t>(stream));
  });
}

}  // namespace marlin::cuda
