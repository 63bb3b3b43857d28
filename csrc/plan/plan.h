// The choice of a kernel and of the partition of its work: pure host code, no CUDA, no torch.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "plan/tile.h"

namespace marlin::plan {

struct Device {
  int sm = 0;            // compute capability, e.g. 90
  int sm_count = 0;      // multiprocessors
  int shared_bytes = 0;  // the most shared memory a block may ask for
  bool wgmma = false;    // Hopper, and this build holds code for it

  // Pairs of blocks, each a cluster, that run at once, one block per multiprocessor; -1: none. 0: not known, and
  // guessed, rightly for an H200.
  int pairs = 0;
  int pairs_at_once() const { return pairs ? (pairs > 0 ? pairs : 0) : sm_count / 2; }
};

// The shared memory that a block may have on GPUs of a compute capability (CUDA programming guide,
// "Technical Specifications per Compute Capability").
int shared_bytes_of(int sm);

struct Problem {
  int64_t m = 0, n = 0, k = 0;
  int64_t group_size = 0;
  Device device;
  bool sparse = false;  // a 2:4 sparse weight
};

struct Kernel {
  int id;  // its place in its table
  const char* family;
  Tile tile;
  const char* reason;
  std::string name() const;
};

std::span<const Kernel> kernels();         // for dense weights
std::span<const Kernel> sparse_kernels();  // for 2:4 sparse ones

struct Plan {
  Kernel kernel;
  Partition partition;
  int64_t workspace_bytes;  // fp32 partial sums
};

// m, n, k >= 1. Throws std::runtime_error where no kernel can run on the device.
Plan select(const Problem& problem);

// The plan with a given kernel of the problem's kind, for benchmarks that try every one.
Plan plan_with(const Kernel& kernel, const Problem& problem);

}  // namespace marlin::plan
