// The torch-free C++ API of marlin: raw pointers, sizes and a CUDA stream.
//
// Arguments are taken as valid: the torch ops (csrc/ops) check them before they come here. Pointers
// are host pointers in namespace marlin::cpu and device pointers in namespace marlin::cuda.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace marlin {

enum class DType : int8_t { kFloat16, kBFloat16 };

// output[m, n] = input[m, perm] . ((q - zeros) * scales)[n, k]^T + bias
struct Gemm {
  const void* input = nullptr;  // [m, k], rows `input_stride` elements apart
  int64_t input_stride = 0;
  const int32_t* qweight = nullptr;  // packed [ceil(n/64), ceil(k/64), 512], 16-byte aligned
  const void* scales = nullptr;      // [groups, n], the input's dtype
  const uint8_t* zeros = nullptr;    // [groups, n] of 0..15, or null: 8 everywhere
  const int32_t* perm = nullptr;  // [k]: packed column j multiplies input feature perm[j]; or null
  const void* bias = nullptr;     // [n], the input's dtype, or null
  void* output = nullptr;         // [m, n], contiguous, 16-byte aligned
  int64_t m = 0, n = 0, k = 0;
  int64_t group_size = 0;  // 32, 64, 128, or any value >= k for one group
  DType dtype = DType::kFloat16;
  // A promise that no kernel still in flight on the stream writes qweight, scales, zeros or meta:
  // they may then be read before the stream's earlier kernels have finished.
  bool static_weights = false;
  // Of a 2:4 sparse weight, as pack_24 makes it, with its qweight; 16-byte aligned; such a one has no
  // perm. Null: dense.
  const int32_t* meta = nullptr;
};

// Where the nibbles of an unpacked or foreign weight are: `source` is one of
struct Unpacked {  // uint8 [n, k]
  const uint8_t* data = nullptr;
};
struct Gptq {  // int32 [k/8, n]: nibble i of word (r, n) is q[n, 8r + i]
  const int32_t* data = nullptr;
  const int32_t* perm = nullptr;  // [k] or null: packed column j is source row perm[j]
};
struct Awq {  // int32 [k, n/8]: nibble i of word (k, c) is q[8c + {0,2,4,6,1,3,5,7}[i], k]
  const int32_t* data = nullptr;
};

// A 2:4 sparse weight before packing: of every four neighbouring columns of a row at most two are kept.
struct Sparse {
  const uint8_t* q = nullptr;  // [n, k] of 0..15; where a stored place is not kept, the zero point
  const uint8_t* mask = nullptr;  // [n, k]: not 0 where kept; k a multiple of 4
};

// weight[n, k] = (q - zeros) * scales, in the scales' dtype and the input features' own order
struct Dequantize {
  const int32_t* qweight = nullptr;
  const int32_t* meta = nullptr;  // of a 2:4 sparse weight, which has no perm; or null: dense
  const void* scales = nullptr;
  const uint8_t* zeros = nullptr;
  const int32_t* perm = nullptr;
  void* weight = nullptr;
  int64_t n = 0, k = 0, group_size = 0;
  DType dtype = DType::kFloat16;
};

namespace cpu {

// Calls body(begin, end) over pieces of [0, count), possibly from several threads, and returns when
// all are done. `grain` is the least worthwhile piece.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const Body& body)>;

void serial_for(int64_t count, int64_t grain, const Body& body);

void gemm(const Gemm& args, const ParallelFor& parallel_for = serial_for);
void dequantize(const Dequantize& args, const ParallelFor& parallel_for = serial_for);

void pack(const Unpacked& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for = serial_for);
void pack(const Gptq& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for = serial_for);
void pack(const Awq& source, int32_t* qweight, int64_t n, int64_t k,
          const ParallelFor& parallel_for = serial_for);
void unpack(const int32_t* qweight, uint8_t* q, int64_t n, int64_t k,
            const ParallelFor& parallel_for = serial_for);

// 2:4 sparse: qweight [ceil(n/64), ceil(k/128), 512], meta [ceil(n/64), ceil(k/128), 256].
void pack_24(const Sparse& source, int32_t* qweight, int32_t* meta, int64_t n, int64_t k,
             const ParallelFor& parallel_for = serial_for);
// mask: 1 at the two stored places of every four, and q there; 0 elsewhere.
void unpack_24(const int32_t* qweight, const int32_t* meta, uint8_t* q, uint8_t* mask, int64_t n,
               int64_t k, const ParallelFor& parallel_for = serial_for);

}  // namespace cpu

// Work is queued on `stream` (a cudaStream_t) of the current device. Errors of the CUDA runtime are
// thrown as std::runtime_error.
namespace cuda {

// Bytes of scratch that `gemm` needs for these very arguments, pointers included, on the current
// device. The scratch must start on 256 bytes; its contents need no initialisation.
int64_t gemm_workspace_bytes(const Gemm& args);
void gemm(const Gemm& args, void* workspace, void* stream);
void dequantize(const Dequantize& args, void* stream);

void pack(const Unpacked& source, int32_t* qweight, int64_t n, int64_t k, void* stream);
void pack(const Gptq& source, int32_t* qweight, int64_t n, int64_t k, void* stream);
void pack(const Awq& source, int32_t* qweight, int64_t n, int64_t k, void* stream);
void unpack(const int32_t* qweight, uint8_t* q, int64_t n, int64_t k, void* stream);
void pack_24(const Sparse& source, int32_t* qweight, int32_t* meta, int64_t n, int64_t k,
             void* stream);
void unpack_24(const int32_t* qweight, const int32_t* meta, uint8_t* q, uint8_t* mask, int64_t n,
               int64_t k, void* stream);

}  // namespace cuda
}  // namespace marlin
