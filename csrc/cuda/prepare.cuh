// What every GEMM kernel wants of its operands: rows on 16-byte boundaries, columns in the packed
// order. Where the caller's tensors are not so, aligned copies of them, in the call's scratch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/check.h"
#include "cuda/gather.cuh"
#include "layout/packed.h"
#include "marlin/marlin.h"

namespace marlin::cuda {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The scratch of one call, in order: copies of what is not aligned (or not in the packed order), then
// partial sums. The copies' sizes are 0 where the caller's tensors will do.
struct Scratch {
  int64_t input_columns, scale_columns;                    // of a padded row
  int64_t input = 0, scales = 0, zeros = 0, partials = 0;  // bytes

  // The kernel reads rows of activations in pieces of `column_multiple` columns.
  Scratch(const Gemm& args, int column_multiple, int64_t partial_bytes)
      : input_columns(round_up(args.k, column_multiple)),
        scale_columns(round_up(args.n, 16)),
        partials(partial_bytes) {
    const int64_t groups = layout::ceil_div(args.k, args.group_size);
    // As after `expand` and `as_strided`; nothing says that the copy engine takes such strides.
    const bool overlap = args.m > 1 && args.input_stride < args.k;
    if (args.perm || args.k % column_multiple != 0 || args.input_stride % 8 != 0 || overlap ||
        !aligned(args.input)) {
      input = round_up(args.m * input_columns * 2, 256);
    }
    // 16 bytes are 8 scales, or 16 zero points.
    if (args.n % (args.zeros ? 16 : 8) != 0 || !aligned(args.scales) || !aligned(args.zeros)) {
      scales = round_up(groups * scale_columns * 2, 256);
      zeros = args.zeros ? round_up(groups * scale_columns, 256) : 0;
    }
  }

  int64_t bytes() const { return input + scales + zeros + partials; }
};

template <typename Value>
void gather(const Value* source, int64_t stride, const int32_t* perm, void* out, int64_t rows,
            int64_t columns, int64_t padded, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(layout::ceil_div(padded, kGatherThreads)),
                  static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  gather_kernel<Value>
      <<<grid, kGatherThreads, 0, stream>>>(source, stride, perm, static_cast<Value*>(out), rows,
                                            static_cast<int>(columns), static_cast<int>(padded));
  check(cudaGetLastError(), "gather_kernel");
}

template <typename Element>
struct Operands {
  const Element* input;
  int64_t input_stride;
  int64_t columns;  // of a row of the input: k, or more with zeros
  const Element* scales;
  const uint8_t* zeros;  // or null
  int64_t scale_stride, groups;
  float* partials;
};

// The operands as the kernel wants them; queues the copies that this takes.
template <typename Element>
Operands<Element> prepare(const Gemm& args, const Scratch& scratch, void* workspace,
                          cudaStream_t stream) {
  auto* at = static_cast<char*>(workspace);
  Operands<Element> out{static_cast<const Element*>(args.input),
                        args.input_stride,
                        scratch.input_columns,
                        static_cast<const Element*>(args.scales),
                        args.zeros,
                        args.n,
                        layout::ceil_div(args.k, args.group_size),
                        nullptr};
  if (scratch.input) {
    gather(out.input, args.input_stride, args.perm, at, args.m, args.k, scratch.input_columns,
           stream);
    out.input = reinterpret_cast<const Element*>(at);
    out.input_stride = scratch.input_columns;
    at += scratch.input;
  }
  if (scratch.scales) {
    const auto copy = [&](auto*& source, int64_t bytes) {
      gather(source, args.n, nullptr, at, out.groups, args.n, scratch.scale_columns, stream);
      source = reinterpret_cast<std::remove_reference_t<decltype(source)>>(at);
      at += bytes;
    };
    copy(out.scales, scratch.scales);
    if (out.zeros) copy(out.zeros, scratch.zeros);
    out.scale_stride = scratch.scale_columns;
  }
  out.partials = reinterpret_cast<float*>(at);
  return out;
}

}  // namespace marlin::cuda
