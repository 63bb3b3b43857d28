// The schemas of torch.ops.marlin. All ops are functional: no mutated argument, no workspace.
// Fake kernels and autograd are registered in marlin/_library.py: the stable ABI has no SymInt.
#include "ops/ops.h"

STABLE_TORCH_LIBRARY(marlin, m) {
  m.def(
      "gemm(Tensor input, Tensor qweight, Tensor scales, Tensor? zeros=None, Tensor? perm=None, "
      "Tensor? bias=None, *, bool static_weights=False) -> Tensor");
  m.def(
      "gemm_24(Tensor input, Tensor qweight, Tensor meta, Tensor scales, Tensor? zeros=None, "
      "Tensor? bias=None, *, bool static_weights=False) -> Tensor");
  m.def("pack(Tensor q) -> Tensor");
  m.def("unpack(Tensor qweight, int n, int k) -> Tensor");
  m.def("repack_gptq(Tensor qweight, Tensor? perm=None) -> Tensor");
  m.def("repack_awq(Tensor qweight) -> Tensor");
  m.def(
      "dequantize(Tensor qweight, Tensor scales, Tensor? zeros=None, Tensor? perm=None, *, "
      "int? k=None) -> Tensor");
  m.def("pack_24(Tensor q, Tensor mask) -> (Tensor, Tensor)");
  m.def("unpack_24(Tensor qweight, Tensor meta, int n, int k) -> (Tensor, Tensor)");
  m.def(
      "dequantize_24(Tensor qweight, Tensor meta, Tensor scales, Tensor? zeros=None, *, "
      "int? k=None) -> Tensor");
}

#define MARLIN_IMPLEMENT(m)                                    \
  m.impl("gemm", TORCH_BOX(&marlin::ops::gemm));               \
  m.impl("gemm_24", TORCH_BOX(&marlin::ops::gemm_24));         \
  m.impl("pack", TORCH_BOX(&marlin::ops::pack));               \
  m.impl("unpack", TORCH_BOX(&marlin::ops::unpack));           \
  m.impl("repack_gptq", TORCH_BOX(&marlin::ops::repack_gptq)); \
  m.impl("repack_awq", TORCH_BOX(&marlin::ops::repack_awq));   \
  m.impl("dequantize", TORCH_BOX(&marlin::ops::dequantize));   \
  m.impl("pack_24", TORCH_BOX(&marlin::ops::pack_24));         \
  m.impl("unpack_24", TORCH_BOX(&marlin::ops::unpack_24));     \
  m.impl("dequantize_24", TORCH_BOX(&marlin::ops::dequantize_24));

// One function serves both keys: it looks at where the tensors are (ops/backend.h).
STABLE_TORCH_LIBRARY_IMPL(marlin, CPU, m){MARLIN_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(marlin,
                                                                                         CUDA, m) {
  MARLIN_IMPLEMENT(m)
}
