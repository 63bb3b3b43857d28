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

// Of the GEMM kernel number `id` of the plan table.
KernelAttributes kernel_attributes(int id, DType dtype);

// For tests and benchmarks: until called again, every gemm of the process runs kernel `id` of the first
// table (-1: whatever the planner chooses), as if the device had `sm_count` multiprocessors (0: as many
// as it has). A kernel that does not fit the problem still gives the right result.
void force_plan(int id, int sm_count, int cluster);

}  // namespace marlin::cuda
