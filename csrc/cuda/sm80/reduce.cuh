// Adds up the partial sums of tiles that several blocks of gemm.cuh shared, in the order of k.
#pragma once

#include "cuda/element.cuh"
#include "cuda/sm80/params.cuh"

namespace marlin::cuda::sm80 {

inline constexpr int kReduceTokens = 4;  // tokens per block of the reduction

// Only the tile's extent matters here, so tiles that differ in depth share one reduction, sparse or not.
template <int kTokens, int kRowBlocks>
using ReduceShape = Shape<kTokens, kRowBlocks, 1, 1, 2, false>;

// Grid: {tiles, ceil(tokens / 4)}; block: {rows, 4}. One thread per output.
template <typename Element, typename S>
__global__ void __launch_bounds__(S::kTile.rows() * kReduceTokens)
    reduce_kernel(const __grid_constant__ Params<Element> p) {
  constexpr int kTokens = S::kTile.tokens, kRows = S::kTile.rows();
  const plan::Partition& part = p.partition;
  const int64_t tile = blockIdx.x;
  const int64_t first_block = part.first_block(tile), last_block = part.last_block(tile);
  if (first_block == last_block) return;  // one block did the whole tile and stored it

  const int row_tile = static_cast<int>(tile / part.token_tiles);
  const int token_tile = static_cast<int>(tile % part.token_tiles);
  const int t = static_cast<int>(blockIdx.y * kReduceTokens + threadIdx.y);
  const int row = static_cast<int>(threadIdx.x);
  const int token = token_tile * kTokens + t, column = row_tile * kRows + row;
  if (token >= p.m || column >= p.n) return;

  float sum = 0.f;
  for (int64_t block = first_block; block <= last_block; ++block) {
    const int slot = part.slot(block, tile);
    sum += p.partials[((block * 2 + slot) * kTokens + t) * kRows + row];
  }
  if (p.bias) sum += to_float(p.bias[column]);
  p.output[int64_t{token} * p.n + column] = from_float<Element>(sum);
}

}  // namespace marlin::cuda::sm80
