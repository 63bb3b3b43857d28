// What the bare kernels share: kernels of one idea each, which say what the hardware allows where the
// real kernels only say what they reach. Build: `make bare`; run: build/bare/memory, build/bare/loop,
// build/bare/issue.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/check.h"

namespace bare {

using marlin::cuda::check;

constexpr int kMultiprocessors = 132;  // of an H200: a block on each

// Random bytes: constant ones would draw less power.
inline char* random_bytes(size_t bytes) {
  std::mt19937 random(0);
  std::vector<uint32_t> piece(size_t{1} << 24);
  for (auto& word : piece) word = random();
  char* device = nullptr;
  check(cudaMalloc(&device, bytes), "cudaMalloc");
  for (size_t at = 0; at < bytes; at += piece.size() * 4) {
    const size_t size = std::min(bytes - at, piece.size() * 4);
    check(cudaMemcpy(device + at, piece.data(), size, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  return device;
}

// Values of about the spread of real activations.
inline __half* random_activations(size_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<__half> host(count);
  for (auto& value : host) value = __float2half(normal(random));
  __half* device = nullptr;
  check(cudaMalloc(&device, count * 2), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), count * 2, cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

// Milliseconds that the stream takes for `work`.
inline double time_ms(cudaStream_t stream, const std::function<void()>& work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  check(cudaEventRecord(begin, stream), "cudaEventRecord");
  work();
  check(cudaEventRecord(end, stream), "cudaEventRecord");
  check(cudaEventSynchronize(end), "cudaEventSynchronize");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
  check(cudaEventDestroy(begin), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  return ms;
}

}  // namespace bare
