// The compiled kernels as function pointers, in the order of plan/kernel_table.inc or, for 2:4 sparse
// weights, of plan/sparse_kernel_table.inc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <span>

namespace marlin::cuda::sm80 {

template <typename Element>
struct Params;

template <typename Element>
struct Instance {
  void (*gemm)(Params<Element>);
  void (*reduce)(Params<Element>);
};

template <typename Element>
std::span<const Instance<Element>> instances(bool sparse);

template <>
std::span<const Instance<__half>> instances(bool sparse);
template <>
std::span<const Instance<__nv_bfloat16>> instances(bool sparse);

}  // namespace marlin::cuda::sm80
