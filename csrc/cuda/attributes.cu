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
  const void* function;
  int shared_bytes, threads;
};

#ifdef MARLIN_WITH_SM90
// With scales every 128 columns.
template <typename Element>
void add_decode_kernels(std::vector<Compiled>& out, bool sparse) {
  for (const plan::DecodeKernel& kernel : plan::decode_kernels(sparse)) {
    const auto function = sm90::decode_instance<Element>(kernel.id, sparse, 128);
    out.push_back({reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(128),
                   kernel.tile.threads()});
  }
}
#endif

// The first table's kernels, then the decode kernels, the prefill kernels, and the decode kernels for 2:4
// sparse weights.
template <typename Element>
std::vector<Compiled> compiled_kernels() {
  std::vector<Compiled> out;
  for (const plan::Kernel& kernel : plan::kernels()) {
    const auto function = sm80::instances<Element>()[kernel.id].gemm;
    out.push_back({reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(),
                   kernel.tile.threads()});
  }
#ifdef MARLIN_WITH_SM90
  add_decode_kernels<Element>(out, false);
  for (const plan::PrefillKernel& kernel : plan::prefill_kernels()) {
    const auto function = sm90::prefill_instance<Element>(kernel.id, 128);
    out.push_back({reinterpret_cast<const void*>(function), kernel.tile.shared_bytes(),
                   kernel.tile.threads()});
  }
  add_decode_kernels<Element>(out, true);
#endif
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
