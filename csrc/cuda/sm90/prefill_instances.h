// The compiled prefill kernels as function pointers, in the order of plan/prefill_table.inc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace marlin::cuda::sm90 {

template <typename Element>
struct PrefillParams;

// Kernel `id` of the table for scales every `period` columns: 32, 64 or 128.
template <typename Element>
auto prefill_instance(int id, int period) -> void (*)(PrefillParams<Element>);

}  // namespace marlin::cuda::sm90
