#include "cuda/attributes.h"

#include <vector>

#include "cuda/check.h"
#include "cuda/element.cuh"
#include "cuda/sm80/instances.h"
#include "plan/numbering.h"
#ifdef MARLIN_WITH_SM90
#include "cuda/sm90/decode_instances.h"
#include "cuda/sm90/prefill_instances.h"
#endif

namespace marlin::cuda {
namespace {

struct Compiled {
  const void* function = nullptr;
  int shared_bytes = 0, threads = 0;
};

template <typename Element>
Compiled compiled(const plan::Kernel& kernel) {
  const auto function = sm80::instances<Element>(kernel.tile.sparse)[kernel.id].gemm;
  return {reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(),
          kernel.tile.threads()};
}

#ifdef MARLIN_WITH_SM90
template <typename Element>
Compiled compiled(const plan::DecodeKernel& kernel) {  // with scales every 128 columns
  const auto function = sm90::decode_instance<Element>(kernel.id, kernel.tile.sparse, 128);
  return {reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(128),
          kernel.tile.threads()};
}

template <typename Element>
Compiled compiled(const plan::PrefillKernel& kernel) {
  const auto function = sm90::prefill_instance<Element>(kernel.id, kernel.tile.sparse, 128);
  return {reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(),
          kernel.tile.threads()};
}
#else  // no code for Hopper
template <typename Element, typename Kernel>
Compiled compiled(const Kernel&) {
  return {};
}
#endif

// In the order of their numbers.
template <typename Element>
std::vector<Compiled> compiled_kernels() {
  std::vector<Compiled> out;
  plan::for_each_table([&](const auto& table) {
    for (const auto& kernel : table) out.push_back(compiled<Element>(kernel));
  });
  return out;
}

}  // namespace

KernelAttributes kernel_attributes(int id, DType dtype) {
  const auto kernels = dispatch(dtype, [](auto* element) {
    return compiled_kernels<std::remove_pointer_t<decltype(element)>>();
  });
  if (id < 0 || id >= static_cast<int>(kernels.size())) {
    throw std::runtime_error("marlin: there is no kernel " + std::to_string(id) + "; there are " +
                             std::to_string(kernels.size()));
  }
  const Compiled& kernel = kernels[id];
  if (!kernel.function) {
    throw std::runtime_error("marlin: kernel " + std::to_string(id) +
                             " is for Hopper, and this build holds no code for it");
  }
  cudaFuncAttributes a{};
  check(cudaFuncGetAttributes(&a, kernel.function), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kernel.shared_bytes),
        "cudaFuncSetAttribute");
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads,
                                                      kernel.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return {a.numRegs,
          static_cast<int>(a.localSizeBytes),
          kernel.shared_bytes,
          kernel.threads,
          blocks,
          a.binaryVersion,
          a.ptxVersion};
}

}  // namespace marlin::cuda
