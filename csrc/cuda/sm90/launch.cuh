// Launches of the Hopper kernels.
#pragma once

#include "cuda/prepare.cuh"
#include "plan/decode.h"
#include "plan/prefill.h"

namespace marlin::cuda::sm90 {

inline constexpr int kColumnMultiple = 64;  // activations are read by boxes of 64 columns

inline Scratch scratch_of(const Gemm& args, const plan::DecodePlan& plan) {
  return {args, kColumnMultiple, plan.partial_bytes()};
}
inline Scratch scratch_of(const Gemm& args, const plan::PrefillPlan& plan) {
  return {args, kColumnMultiple, plan.partial_bytes()};
}

// How many pairs of blocks run at once on the current device (plan::Device::pairs).
int pairs_at_once();

template <typename Element>
void launch(const Gemm& args, const plan::DecodePlan& plan, void* workspace, cudaStream_t stream);
template <typename Element>
void launch(const Gemm& args, const plan::PrefillPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace marlin::cuda::sm90
