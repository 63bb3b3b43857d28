// Launches of the sm80 kernels: the plan's kernel, then the reduction where tiles are shared.
#pragma once

#include "cuda/prepare.cuh"
#include "plan/plan.h"

namespace marlin::cuda::sm80 {

inline constexpr int kColumnMultiple = 8;  // activations are read 16 bytes at a time

inline Scratch scratch_of(const Gemm& args, const plan::Plan& plan) {
  return {args, kColumnMultiple, plan.workspace_bytes};
}

template <typename Element>
void launch(const Gemm& args, const plan::Plan& plan, void* workspace, cudaStream_t stream);

}  // namespace marlin::cuda::sm80
