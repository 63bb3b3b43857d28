// Copies rows into the order and alignment that the GEMM kernels want: column j gets perm[j]
// (act-order), and rows are padded with zeros. Run only where there is a permutation, or where rows
// are not 16-byte aligned, since k, n or a stride is no multiple of 16 bytes.
#pragma once

#include <cstdint>

namespace marlin::cuda {

inline constexpr int kGatherThreads = 256;

// Grid: {ceil(padded / 256), min(rows, 65535)}. An index out of range gives NaN rather than a read
// from somewhere else: perm cannot be checked on the host without waiting for the device.
template <typename Value>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const Value* input, int64_t stride, const int32_t* perm, Value* out, int64_t rows,
                  int columns, int padded) {
  const int column = static_cast<int>(blockIdx.x) * kGatherThreads + static_cast<int>(threadIdx.x);
  if (column >= padded) return;
  const int source = perm && column < columns ? perm[column] : column;
  const bool valid = 0 <= source && source < columns;
  const Value other = Value(column < columns ? __int_as_float(0x7fffffff) : 0.f);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    out[row * padded + column] = valid ? input[row * stride + source] : other;
  }
}

}  // namespace marlin::cuda
