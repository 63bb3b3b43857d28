// The GEMM on the CPU: what a machine without a GPU runs. A thread takes 64 output features and
// goes along k in blocks of 64: it expands a packed block to fp32 once (16 KB, in L1) and multiplies
// it with every token, four at a time. A 2:4 sparse block becomes two such blocks, mostly zeros: right
// rather than fast. Sums are fp32, in the order of k, so the same input gives the
// same bits whatever the number of threads.
#include <algorithm>
#include <vector>

#include "cpu/half.h"
#include "layout/convert.h"
#include "layout/packed.h"
#include "layout/sparse.h"

// The compiler makes a version of a function for each of these and the loader picks one, so that a
// portable build still uses AVX2 or AVX-512. By processor names: GCC 11 has no dispatcher for levels
// such as x86-64-v3.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MARLIN_CLONES \
  __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define MARLIN_CLONES
#endif

namespace marlin::cpu {
namespace {

constexpr int kBlock = layout::kBlock;

// Eight at a time, by the vector extension of GCC and Clang: left to itself the compiler unrolls such
// short loops before it vectorises them: M = 128, 4096 x 4096 took 20 times as long (GCC 12, AVX2).
constexpr int kLanes = 8;
using Floats [[gnu::vector_size(4 * kLanes), gnu::may_alias]] = float;
using Words [[gnu::vector_size(4 * kLanes)]] = uint32_t;

struct ExpandedBlock {
  alignas(64) float weight[kBlock][kBlock];  // [column][row]: 64 output features side by side
};

// Of a block's rows, for its four quarters. The shortest group has 32 columns, two quarters; of a sparse
// block, which stands for twice as many, one.
constexpr int kQuarter = kBlock / 4;
struct GroupConstants {
  alignas(64) float scale[4][kBlock];
  alignas(64) float zero[4][kBlock];
};

[[gnu::always_inline]] inline const Floats& lanes(const float* at) {
  return *reinterpret_cast<const Floats*>(at);
}
[[gnu::always_inline]] inline Floats& lanes(float* at) { return *reinterpret_cast<Floats*>(at); }

// The integers of a packed block less the zero point are exact in fp32, and so is their product
// with an fp16 or bf16 scale (5 + 11 bits): the only rounding is that of the sums.
//
// The eight lanes of a warp with equal t hold eight neighbouring rows of the same columns (see
// position_of), so a vector of eight words gives vectors of eight neighbouring weights.
MARLIN_CLONES void expand(const int32_t* packed, const GroupConstants& group, ExpandedBlock& out) {
  for (int warp = 0; warp < 4; ++warp) {
    for (int step = 0; step < layout::kWordsPerThread; ++step) {
      for (int t = 0; t < 4; ++t) {
        Words words;
        for (int g = 0; g < kLanes; ++g) {
          const int thread = 32 * warp + 4 * g + t;
          words[g] = static_cast<uint32_t>(packed[thread * layout::kWordsPerThread + step]);
        }
        words = words >> layout::kRotation | words << (32 - layout::kRotation);
        for (int i = 0; i < layout::kNibblesPerWord; ++i) {
          const layout::Position first = layout::position_of({32 * warp + t, step, i});
          const int quarter = first.col / kQuarter;
          const Floats q = __builtin_convertvector(words >> 4 * i & 15, Floats);
          lanes(out.weight[first.col] + first.row) = (q - lanes(group.zero[quarter] + first.row)) *
                                                     lanes(group.scale[quarter] + first.row);
        }
      }
    }
  }
}

// The survivors of a sparse block at their places among its 128 columns.
void spread(const int32_t* meta, const ExpandedBlock& survivors, ExpandedBlock (&out)[2]) {
  for (ExpandedBlock& half : out) std::fill_n(&half.weight[0][0], kBlock * kBlock, 0.f);
  for (int quad = 0; quad < layout::kQuads; ++quad) {
    for (int row = 0; row < kBlock; ++row) {
      const layout::Places places = layout::packed_places(meta, 1, row, quad);
      float(*to)[kBlock] = out[quad * 4 / kBlock].weight + quad * 4 % kBlock;
      to[places.first][row] = survivors.weight[2 * quad][row];
      to[places.second][row] = survivors.weight[2 * quad + 1][row];
    }
  }
}

// sums[t][row] += sum over columns of block[column][row] * input[t][column], for a strip of 16 rows
// and `kCount` tokens: few enough sums to stay in registers along the block.
template <int kCount>
[[gnu::always_inline]] inline void multiply_strip(const ExpandedBlock& block, int row,
                                                  const float* input, int64_t stride,
                                                  float (*sums)[kBlock]) {
  Floats low[kCount], high[kCount];
  for (int t = 0; t < kCount; ++t) {
    low[t] = lanes(sums[t] + row);
    high[t] = lanes(sums[t] + row + kLanes);
  }
  for (int c = 0; c < kBlock; ++c) {
    const Floats weight_low = lanes(block.weight[c] + row);
    const Floats weight_high = lanes(block.weight[c] + row + kLanes);
    for (int t = 0; t < kCount; ++t) {
      low[t] += weight_low * input[t * stride + c];
      high[t] += weight_high * input[t * stride + c];
    }
  }
  for (int t = 0; t < kCount; ++t) {
    lanes(sums[t] + row) = low[t];
    lanes(sums[t] + row + kLanes) = high[t];
  }
}

// All 64 rows of a block, all tokens.
MARLIN_CLONES void multiply(const ExpandedBlock& block, const float* input, int64_t stride,
                            int64_t tokens, float (*sums)[kBlock]) {
  for (int row = 0; row < kBlock; row += 2 * kLanes) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      multiply_strip<4>(block, row, input + t * stride, stride, sums + t);
    }
    for (; t < tokens; ++t) multiply_strip<1>(block, row, input + t * stride, stride, sums + t);
  }
}

int columns_of_block(const Gemm& args) { return args.meta ? layout::kSparseColumns : kBlock; }

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
      for (int64_t c = 0; c < args.k; ++c)
        to[c] = to_float<kType>(row[args.perm ? args.perm[c] : c]);
    }
  });
  return out;
}

// One tile of 64 output features, all tokens.
template <DType kType>
class RowTile {
 public:
  RowTile(const Gemm& args, const float* input, int64_t k_padded)
      : args_(args), input_(input), k_padded_(k_padded), sums_(static_cast<size_t>(args.m)) {}

  void compute(int64_t n_block) {
    auto* sums = reinterpret_cast<float(*)[kBlock]>(sums_.data());
    std::fill(sums_.begin(), sums_.end(), Sums{});
    const int columns = columns_of_block(args_);
    const int64_t k_blocks = k_padded_ / columns;
    for (int64_t k_block = 0; k_block < k_blocks; ++k_block) {
      const float* input = input_ + k_block * columns;
      load_groups(n_block, k_block * columns, columns / 4);
      expand(args_.qweight + layout::word_index(n_block, k_block, k_blocks, 0, 0), group_, block_);
      if (!args_.meta) {
        multiply(block_, input, k_padded_, args_.m, sums);
        continue;
      }
      spread(args_.meta + (n_block * k_blocks + k_block) * layout::kMetaWordsPerBlock, block_,
             halves_);
      for (int half = 0; half < 2; ++half) {
        multiply(halves_[half], input + half * kBlock, k_padded_, args_.m, sums);
      }
    }
    store(n_block, sums);
  }

 private:
  // From column `first` on, four times `columns` of them.
  void load_groups(int64_t n_block, int64_t first, int columns) {
    const auto* scales = static_cast<const uint16_t*>(args_.scales);
    const int64_t last_group = (args_.k - 1) / args_.group_size;
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t column = first + quarter * columns;
      const int64_t group = std::min(column / args_.group_size, last_group);
      for (int row = 0; row < kBlock; ++row) {
        const int64_t feature = n_block * kBlock + row;
        const bool valid = feature < args_.n;
        const int64_t at = group * args_.n + feature;
        group_.scale[quarter][row] = valid ? to_float<kType>(scales[at]) : 0.f;
        group_.zero[quarter][row] =
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
  struct alignas(64) Sums {
    float of_row[kBlock] = {};
  };
  std::vector<Sums> sums_;  // of every token
  ExpandedBlock block_, halves_[2];
  GroupConstants group_;
};

}  // namespace

void gemm(const Gemm& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.n == 0) return;
  const int64_t k_padded =
      layout::ceil_div(args.k, columns_of_block(args)) * columns_of_block(args);
  dispatch(args.dtype, [&]<DType kType>() {
    const auto input = expanded_input<kType>(args, k_padded, parallel_for);
    parallel_for(layout::ceil_div(args.n, kBlock), 1, [&](int64_t begin, int64_t end) {
      RowTile<kType> tile(args, input.data(), k_padded);
      for (int64_t n_block = begin; n_block < end; ++n_block) tile.compute(n_block);
    });
  });
}

}  // namespace marlin::cpu
