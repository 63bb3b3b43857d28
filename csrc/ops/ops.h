// The ops as C++ functions on stable-ABI tensors; register.cpp gives them their names and schemas.
#pragma once

#include <tuple>

#include "ops/torch_stable.h"

namespace marlin::ops {

Tensor gemm(Tensor input, Tensor qweight, Tensor scales, OptionalTensor zeros, OptionalTensor perm,
            OptionalTensor bias, bool static_weights);
Tensor gemm_24(Tensor input, Tensor qweight, Tensor meta, Tensor scales, OptionalTensor zeros,
               OptionalTensor bias, bool static_weights);
Tensor pack(Tensor q);
Tensor unpack(Tensor qweight, int64_t n, int64_t k);
Tensor repack_gptq(Tensor qweight, OptionalTensor perm);
Tensor repack_awq(Tensor qweight);
Tensor dequantize(Tensor qweight, Tensor scales, OptionalTensor zeros, OptionalTensor perm,
                  std::optional<int64_t> k);
std::tuple<Tensor, Tensor> pack_24(Tensor q, Tensor mask);
std::tuple<Tensor, Tensor> unpack_24(Tensor qweight, Tensor meta, int64_t n, int64_t k);
Tensor dequantize_24(Tensor qweight, Tensor meta, Tensor scales, OptionalTensor zeros,
                     std::optional<int64_t> k);

}  // namespace marlin::ops
