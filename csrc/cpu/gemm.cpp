// The GEMM on the CPU: what a machine without a GPU runs. A thread takes 64 output features and
// goes along k in blocks of 64: it expands a packed block to fp32 once (16 KB, in L1) and multiplies
// it with every token, four at a time. Sums are fp32, in the order of k, so the same input gives the
// same bits whatever the number of threads.
#include <algorithm>
#include <vector>

#include "cpu/half.h"
#include "layout/convert.h"
#include "layout/packed.h"

// The compiler makes a version of a function for each of these and the loader picks one, so that a
// portable build still uses AVX2 or AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MARLIN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MARLIN_CLONES
#endif

namespace marlin::cpu {
namespace {

constexpr int kBlock = layout::kBlock;

struct ExpandedBlock {
  alignas(64) float weight[kBlock][kBlock];  // [column][row]: 64 output features side by side
};

// The integers of a packed block less the zero point are exact in fp32, and so is their product
// with an fp16 or bf16 scale (5 + 11 bits): the only rounding is that of the sums.
void expand(const int32_t* packed, const float (&scale)[kBlock][kBlock / 32],
            const float (&zero)[kBlock][kBlock / 32], ExpandedBlock& out) {
  for (int thread = 0; thread < layout::kThreads; ++thread) {
    for (int step = 0; step < layout::kWordsPerThread; ++step) {
      const auto word = static_cast<uint32_t>(packed[thread * layout::kWordsPerThread + step]);
      for (int i = 0; i < layout::kNibblesPerWord; ++i) {
        const layout::Position p = layout::position_of({thread, step, i});
        const float q = static_cast<float>(layout::nibble_of(word, i));
        out.weight[p.col][p.row] = (q - zero[p.row][p.col / 32]) * scale[p.row][p.col / 32];
      }
    }
  }
}

// A strip of 16 rows and `kCount` tokens: few enough sums to stay in registers along the block.
template <int kCount>
[[gnu::always_inline]] inline void multiply_strip(const ExpandedBlock& block, int first_row,
                                                  const float* input, int64_t stride,
                                                  float (*sums)[kBlock]) {
  constexpr int kStrip = 16;
  float s[kCount][kStrip];
  for (int t = 0; t < kCount; ++t) {
    for (int i = 0; i < kStrip; ++i) s[t][i] = sums[t][first_row + i];
  }
  for (int c = 0; c < kBlock; ++c) {
    for (int t = 0; t < kCount; ++t) {
      const float x = input[t * stride + c];
      for (int i = 0; i < kStrip; ++i) s[t][i] += block.weight[c][first_row + i] * x;
    }
  }
  for (int t = 0; t < kCount; ++t) {
    for (int i = 0; i < kStrip; ++i) sums[t][first_row + i] = s[t][i];
  }
}

// sums[t][row] += sum over columns of block[column][row] * input[t][column]
MARLIN_CLONES void multiply(const ExpandedBlock& block, const float* input, int64_t stride,
                            int64_t tokens, float (*sums)[kBlock]) {
  for (int row = 0; row < kBlock; row += 16) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      multiply_strip<4>(block, row, input + t * stride, stride, sums + t);
    }
    for (; t < tokens; ++t) multiply_strip<1>(block, row, input + t * stride, stride, sums + t);
  }
}

// The input as fp32, in the packed order, rows padded with zeros to whole blocks.
template <DType kType>
std::vector<float> expanded_input(const Gemm& args, int64_t k_padded,
                                  const ParallelFor& parallel_for) {
  std::vector<float> out(static_cast<size_t>(args.m * k_padded));
  const auto* input = static_cast<const uint16_t*>(args.input);
  parallel_for(args.m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const uint16_t* row = input + t * args.input_stride;
      float* to = out.data() + t * k_padded;
      for (int64_t c = 0; c < args.k; ++c) to[c] = to_float<kType>(row[args.perm ? args.perm[c] : c]);
    }
  });
  return out;
}

// One tile of 64 output features, all tokens.
template <DType kType>
class RowTile {
 public:
  RowTile(const Gemm& args, const float* input, int64_t k_padded)
      : args_(args), input_(input), k_padded_(k_padded), sums_(args.m * kBlock) {}

  void compute(int64_t n_block) {
    auto* sums = reinterpret_cast<float(*)[kBlock]>(sums_.data());
    std::fill(sums_.begin(), sums_.end(), 0.f);
    const int64_t k_blocks = k_padded_ / kBlock;
    for (int64_t k_block = 0; k_block < k_blocks; ++k_block) {
      load_groups(n_block, k_block);
      expand(args_.qweight + layout::word_index(n_block, k_block, k_blocks, 0, 0), scale_, zero_,
             block_);
      multiply(block_, input_ + k_block * kBlock, k_padded_, args_.m, sums);
    }
    store(n_block, sums);
  }

 private:
  // Scales and zero points of the block's rows, for its two halves of 32 columns.
  void load_groups(int64_t n_block, int64_t k_block) {
    const auto* scales = static_cast<const uint16_t*>(args_.scales);
    const int64_t last_group = (args_.k - 1) / args_.group_size;
    for (int half = 0; half < 2; ++half) {
      const int64_t column = k_block * kBlock + half * 32;
      const int64_t group = std::min(column / args_.group_size, last_group);
      for (int row = 0; row < kBlock; ++row) {
        const int64_t feature = n_block * kBlock + row;
        const bool valid = feature < args_.n;
        const int64_t at = group * args_.n + feature;
        scale_[row][half] = valid ? to_float<kType>(scales[at]) : 0.f;
        zero_[row][half] =
            static_cast<float>(valid && args_.zeros ? args_.zeros[at] : layout::kSymmetricZero);
      }
    }
  }

  void store(int64_t n_block, const float (*sums)[kBlock]) const {
    const auto* bias = static_cast<const uint16_t*>(args_.bias);
    auto* output = static_cast<uint16_t*>(args_.output);
    const int rows = static_cast<int>(std::min<int64_t>(kBlock, args_.n - n_block * kBlock));
    for (int64_t t = 0; t < args_.m; ++t) {
      for (int row = 0; row < rows; ++row) {
        const int64_t feature = n_block * kBlock + row;
        const float sum = sums[t][row] + (bias ? to_float<kType>(bias[feature]) : 0.f);
        output[t * args_.n + feature] = from_float<kType>(sum);
      }
    }
  }

  const Gemm& args_;
  const float* input_;
  const int64_t k_padded_;
  std::vector<float> sums_;
  ExpandedBlock block_;
  float scale_[kBlock][kBlock / 32], zero_[kBlock][kBlock / 32];
};

}  // namespace

void gemm(const Gemm& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.n == 0) return;
  const int64_t k_padded = layout::ceil_div(args.k, kBlock) * kBlock;
  dispatch(args.dtype, [&]<DType kType>() {
    const auto input = expanded_input<kType>(args, k_padded, parallel_for);
    parallel_for(layout::ceil_div(args.n, kBlock), 1, [&](int64_t begin, int64_t end) {
      RowTile<kType> tile(args, input.data(), k_padded);
      for (int64_t n_block = begin; n_block < end; ++n_block) tile.compute(n_block);
    });
  });
}

}  // namespace marlin::cpu
