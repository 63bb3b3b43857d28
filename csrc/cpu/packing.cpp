#include <algorithm>

#include "cpu/half.h"
#include "layout/source.h"

namespace marlin::cpu {
namespace {

template <typename Source>
void pack_words(const Source& source, int32_t* qweight, layout::Shape shape,
                const ParallelFor& parallel_for) {
  parallel_for(shape.words(), layout::kWordsPerBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      qweight[i] = static_cast<int32_t>(layout::packed_word(source, shape, i));
    }
  });
}

}  // namespace

void serial_for(int64_t count, int64_t /*grain*/, const Body& body) {
  if (count > 0) body(0, count);
}

void pack(const Unpacked& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for) {
  pack_words(source, qweight, {n, k}, parallel_for);
}

void pack(const Gptq& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for) {
  pack_words(source, qweight, {n, k}, parallel_for);
}

void pack(const Awq& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for) {
  pack_words(source, qweight, {n, k}, parallel_for);
}

void unpack(const int32_t* qweight, uint8_t* q, int64_t n, int64_t k,
            const ParallelFor& parallel_for) {
  const int64_t k_blocks = layout::ceil_div(k, layout::kBlock);
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < k; ++col) {
        q[row * k + col] =
            static_cast<uint8_t>(layout::unpacked_weight(qweight, k_blocks, row, col));
      }
    }
  });
}

void dequantize(const Dequantize& args, const ParallelFor& parallel_for) {
  const int64_t k_blocks = layout::ceil_div(args.k, layout::kBlock);
  const auto* scales = static_cast<const uint16_t*>(args.scales);
  auto* weight = static_cast<uint16_t*>(args.weight);
  // What a bad permutation leaves out must not be stray memory: all ones is NaN.
  if (args.perm) std::fill_n(weight, args.n * args.k, uint16_t{0xffff});
  dispatch(args.dtype, [&]<DType kType>() {
    parallel_for(args.n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < args.k; ++col) {
          const int64_t at = col / args.group_size * args.n + row;
          const int q = static_cast<int>(layout::unpacked_weight(args.qweight, k_blocks, row, col));
          const int zero = args.zeros ? args.zeros[at] : layout::kSymmetricZero;
          const int64_t feature = args.perm ? args.perm[col] : col;
          weight[row * args.k + feature] =
              from_float<kType>(static_cast<float>(q - zero) * to_float<kType>(scales[at]));
        }
      }
    });
  });
}

}  // namespace marlin::cpu
