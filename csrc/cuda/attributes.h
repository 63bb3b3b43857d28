// What the driver says of a compiled kernel on the current device.
#pragma once

#include "marlin/marlin.h"

namespace marlin::cuda {

struct KernelAttributes {
  int registers;       // per thread
  int local_bytes;     // per thread; spills would show here
  int shared_bytes;    // per block
  int threads;         // per block
  int blocks_per_sm;   // how many fit on a multiprocessor at once
  int binary_version;  // 10 * compute capability of the machine code, e.g. 90
  int ptx_version;
};

// Of the GEMM kernel number `id` of `marlin._inspect.plans`.
KernelAttributes kernel_attributes(int id, DType dtype);

// For tests and benchmarks: until called again, every gemm of the process that it can do runs kernel
// `id` of `marlin._inspect.plans` (-1: whatever the planner chooses), as if the device had `sm_count`
// multiprocessors (0: as many as it has). `shares`: with blocks that share tiles which do not go round,
// in decode kernels in pairs, in prefill kernels over memory; not asked where the planner chooses, by
// sm80 kernels, which always share, nor by decode kernels that are for sharing alone. A gemm throws where
// its weight is 2:4 sparse and the kernel for dense ones, or vice versa.
void force_plan(int id, int sm_count, bool shares);

}  // namespace marlin::cuda
