// Packing, unpacking and dequantising on the GPU. Load-time work: one thread per word or weight,
// and the index maps of layout/ doing the thinking.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/element.cuh"
#include "layout/source.h"
#include "layout/sparse.h"

namespace marlin::cuda {
namespace {

constexpr int kThreads = 256;

// A grid-stride loop over [0, count).
template <typename F>
__global__ void __launch_bounds__(kThreads) for_each_kernel(int64_t count, F f) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) f(i);
}

template <typename F>
void for_each(int64_t count, void* stream, const char* what, const F& f) {
  if (count == 0) return;
  const int64_t blocks = std::min<int64_t>(layout::ceil_div(count, kThreads), 1 << 20);
  for_each_kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                    static_cast<cudaStream_t>(stream)>>>(count, f);
  check(cudaGetLastError(), what);
}

template <typename Source>
struct PackWord {
  Source source;
  layout::Shape shape;
  int32_t* qweight;
  __device__ void operator()(int64_t i) const {
    qweight[i] = static_cast<int32_t>(layout::packed_word(source, shape, i));
  }
};

struct UnpackWeight {
  const int32_t* qweight;
  layout::Shape shape;
  uint8_t* q;
  __device__ void operator()(int64_t i) const {
    q[i] = static_cast<uint8_t>(
        layout::unpacked_weight(qweight, shape.k_blocks(), i / shape.k, i % shape.k));
  }
};

struct PackMeta {
  Sparse source;
  layout::SparseShape shape;
  int32_t* meta;
  __device__ void operator()(int64_t i) const {
    meta[i] = static_cast<int32_t>(layout::meta_word(source, shape, i));
  }
};

struct UnpackSparse {
  const int32_t *qweight, *meta;
  layout::SparseShape shape;
  uint8_t *q, *mask;
  __device__ void operator()(int64_t i) const {
    const int stored =
        layout::unpacked_survivor(qweight, meta, shape.k_blocks(), i / shape.k, i % shape.k);
    mask[i] = stored >= 0;
    q[i] = static_cast<uint8_t>(stored < 0 ? 0 : stored);
  }
};

template <typename Element>
struct DequantizeWeight {
  Dequantize args;
  int64_t k_blocks;
  // i counts packed columns; the permutation says which input feature the weight belongs to.
  __device__ void operator()(int64_t i) const {
    const int64_t row = i / args.k, column = i % args.k;
    const int64_t at = column / args.group_size * args.n + row;
    const int zero = args.zeros ? args.zeros[at] : layout::kSymmetricZero;
    const int q = layout::weight_or_zero(args, k_blocks, row, column, zero);
    const float scale = to_float(static_cast<const Element*>(args.scales)[at]);
    const int64_t feature = args.perm ? args.perm[column] : column;
    if (feature < 0 || feature >= args.k) return;  // its column stays NaN
    static_cast<Element*>(args.weight)[row * args.k + feature] =
        from_float<Element>(static_cast<float>(q - zero) * scale);
  }
};

}  // namespace

void pack(const Unpacked& source, int32_t* qweight, int64_t n, int64_t k, void* stream) {
  const layout::Shape shape{n, k};
  for_each(shape.words(), stream, "pack", PackWord<Unpacked>{source, shape, qweight});
}

void pack(const Gptq& source, int32_t* qweight, int64_t n, int64_t k, void* stream) {
  const layout::Shape shape{n, k};
  for_each(shape.words(), stream, "repack_gptq", PackWord<Gptq>{source, shape, qweight});
}

void pack(const Awq& source, int32_t* qweight, int64_t n, int64_t k, void* stream) {
  const layout::Shape shape{n, k};
  for_each(shape.words(), stream, "repack_awq", PackWord<Awq>{source, shape, qweight});
}

void unpack(const int32_t* qweight, uint8_t* q, int64_t n, int64_t k, void* stream) {
  for_each(n * k, stream, "unpack", UnpackWeight{qweight, {n, k}, q});
}

void pack_24(const Sparse& source, int32_t* qweight, int32_t* meta, int64_t n, int64_t k,
             void* stream) {
  const layout::SparseShape shape{n, k};
  const layout::Shape survivors = shape.survivors();
  for_each(survivors.words(), stream, "pack_24", PackWord<Sparse>{source, survivors, qweight});
  for_each(shape.meta_words(), stream, "pack_24", PackMeta{source, shape, meta});
}

void unpack_24(const int32_t* qweight, const int32_t* meta, uint8_t* q, uint8_t* mask, int64_t n,
               int64_t k, void* stream) {
  for_each(n * k, stream, "unpack_24", UnpackSparse{qweight, meta, {n, k}, q, mask});
}

void dequantize(const Dequantize& args, void* stream) {
  const int64_t k_blocks =
      layout::ceil_div(args.k, args.meta ? layout::kSparseColumns : layout::kBlock);
  if (args.perm) {  // what a bad permutation leaves out must not be stray memory: all ones is NaN
    check(cudaMemsetAsync(args.weight, 0xff, static_cast<size_t>(args.n * args.k * 2),
                          static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
  }
  dispatch(args.dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    for_each(args.n * args.k, stream, "dequantize", DequantizeWeight<Element>{args, k_blocks});
  });
}

}  // namespace marlin::cuda
