// Argument checks of the ops. Every message says: which op and argument, what it got, the rule, and
// where it helps, the fix. marlin/_library.py states the same rules for fake tensors; a test compares
// the two word for word.
#pragma once

#include <string>

#include "ops/torch_stable.h"

namespace marlin::ops {

// A packed weight's sizes, told from its tensors.
struct WeightShape {
  int64_t n, k, groups, group_size;
};

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted);
void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* layout);
void check_contiguous(const char* op, const char* name, const Tensor& t);
void check_same_device(const char* op, const char* name, const Tensor& t,
                       const char* reference_name, const Tensor& reference);

// Starts on 16 bytes, as the kernels read it.
void check_alignment(const char* op, const char* name, const Tensor& t);

void check_not_empty(const char* op, const char* name, const Tensor& t);

// int32 [ceil(n/64), ceil(k/64), 512], contiguous; of a 2:4 sparse weight [ceil(n/64), ceil(k/128), 512].
void check_packed(const char* op, const Tensor& qweight, bool sparse = false);

// int32 [ceil(n/64), ceil(k/128), 256] for this qweight, contiguous, on a 16-byte boundary.
void check_meta(const char* op, const Tensor& meta, const Tensor& qweight);

// A number of columns, a multiple of 4.
void check_quads(const char* op, const char* name, int64_t k);

// The two places of every four rise. Reads meta entry by entry: copied to the CPU first where it is on
// a GPU.
void check_places(const char* op, const Tensor& meta, int64_t n, int64_t k);

// qweight, scales, zeros and perm against each other and against k input features.
WeightShape check_weight(const char* op, const Tensor& qweight, const Tensor& scales,
                         const OptionalTensor& zeros, const OptionalTensor& perm, int64_t k,
                         bool sparse = false);

// The largest entry of uint8 [n, k]; waits for the device. Packing is load-time work.
int64_t largest(const Tensor& bytes);

// int32 [k], on qweight's device.
void check_perm(const char* op, const Tensor& perm, int64_t k, const Tensor& qweight);

// A permutation of 0..k-1, read entry by entry: copied to the CPU first where it is on a GPU.
void check_permutation(const char* op, const Tensor& perm, int64_t k);

// perm's entries lie in 0..k-1. Only for CPU tensors: on a GPU this would wait for the device, so
// there the kernels never follow an index out of range (the result is NaN instead).
void check_range_on_cpu(const char* op, const OptionalTensor& perm, int64_t k);

}  // namespace marlin::ops
