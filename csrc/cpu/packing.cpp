#include <algorithm>

#include "cpu/half.h"
#include "layout/source.h"
#include "layout/sparse.h"

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

void pack_24(const Sparse& source, int32_t* qweight, int32_t* meta, int64_t n, int64_t k,
             const ParallelFor& parallel_for) {
  const layout::SparseShape shape{n, k};
  pack_words(source, qweight, shape.survivors(), parallel_for);
  parallel_for(shape.meta_words(), layout::kMetaWordsPerBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      meta[i] = static_cast<int32_t>(layout::meta_word(source, shape, i));
    }
  });
}

void unpack_24(const int32_t* qweight, const int32_t* meta, uint8_t* q, uint8_t* mask, int64_t n,
               int64_t k, const ParallelFor& parallel_for) {
  const int64_t k_blocks = layout::SparseShape{n, k}.k_blocks();
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * k; i < end * k; ++i) {
      const int stored = layout::unpacked_survivor(qweight, meta, k_blocks, i / k, i % k);
      mask[i] = stored >= 0;
      q[i] = static_cast<uint8_t>(std::max(stored, 0));
    }
  });
}

void dequantize(const Dequantize& args, const ParallelFor& parallel_for) {
  const int64_t k_blocks =
      layout::ceil_div(args.k, args.meta ? layout::kSparseColumns : layout::kBlock);
  const auto* scales = static_cast<const uint16_t*>(args.scales);
  auto* weight = static_cast<uint16_t*>(args.weight);
  // What a bad permutation leaves out must not be stray memory: all ones is NaN.
  if (args.perm) std::fill_n(weight, args.n * args.k, uint16_t{0xffff});
  dispatch(args.dtype, [&]<DType kType>() {
    parallel_for(args.n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < args.k; ++col) {
          const int64_t at = col / args.group_size * args.n + row;
          const int zero = args.zeros ? args.zeros[at] : layout::kSymmetricZero;
          const int q = layout::weight_or_zero(args, k_blocks, row, col, zero);
          const int64_t feature = args.perm ? args.perm[col] : col;
          weight[row * args.k + feature] =
              from_float<kType>(static_cast<float>(q - zero) * to_float<kType>(scales[at]));
        }
      }
    });
  });
}

}  // namespace marlin::cpu
