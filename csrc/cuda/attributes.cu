#include "cuda/attributes.h"

#include <vector>

#include "cuda/check.h"
#include "cuda/element.cuh"
#include "cuda/sm80/instances.h"
#include "plan/decode.h"
#include "plan/prefill.h"
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

// In the order of their numbers: the sm80 kernels, the decode kernels with scales every 128 columns, the
// prefill kernels, the sm80 kernels for 2:4 sparse weights. Those for Hopper are null in a build without
// code for it.
template <typename Element>
std::vector<Compiled> compiled_kernels() {
  std::vector<Compiled> out;
  for (const plan::Kernel& kernel : plan::kernels()) out.push_back(compiled<Element>(kernel));
#ifdef MARLIN_WITH_SM90
  for (const plan::DecodeKernel& kernel : plan::decode_kernels()) {
    const auto function = sm90::decode_instance<Element>(kernel.id, 128);
    out.push_back({reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(128),
                   kernel.tile.threads()});
  }
  for (const plan::PrefillKernel& kernel : plan::prefill_kernels()) {
    const auto function = sm90::prefill_instance<Element>(kernel.id, 128);
    out.push_back({reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(),
                   kernel.tile.threads()});
  }
#else
  out.resize(out.size() + plan::decode_kernels().size() + plan::prefill_kernels().size());
#endif
  for (const plan::Kernel& kernel : plan::sparse_kernels()) {
    out.push_back(compiled<Element>(kernel));
  }
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
