// The compiled prefill kernels as function pointers, in the order of plan/prefill_table.inc or, for 2:4
// sparse weights, plan/prefill_24_table.inc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace marlin::cuda::sm90 {

template <typename Element>
struct PrefillParams;

// Kernel `id` of its table for scales every `period` columns: 32, 64 or 128.
template <typename Element, bool kSparse>
auto prefill_instance(int id, int period) -> void (*)(PrefillParams<Element>);

template <typename Element>
auto prefill_instance(int id, bool sparse, int period) -> void (*)(PrefillParams<Element>) {
  return sparse ? prefill_instance<Element, true>(id, period)
                : prefill_instance<Element, false>(id, period);
}

}  // namespace marlin::cuda::sm90
