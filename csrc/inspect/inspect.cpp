// marlin._inspect: what was built and what the planner chooses, as plain Python objects. No torch.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <filesystem>
#include <stdexcept>
#include <string>

#include "cuda/attributes.h"
#include "plan/plan.h"

namespace py = pybind11;

namespace marlin::inspect {
namespace {

py::dict describe(const plan::Kernel& kernel) {
  py::dict out;
  out["id"] = kernel.id;
  out["name"] = kernel.name();
  out["family"] = kernel.family;
  out["tokens"] = kernel.tile.tokens;
  out["rows"] = kernel.tile.rows();
  out["stage_k"] = kernel.tile.stage_k();
  out["stages"] = kernel.tile.stages;
  out["threads"] = kernel.tile.threads();
  out["shared_bytes"] = kernel.tile.shared_bytes();
  out["reason"] = kernel.reason;
  return out;
}

py::list plans() {
  py::list out;
  for (const plan::Kernel& kernel : plan::kernels()) out.append(describe(kernel));
  return out;
}

py::dict plan_for(int64_t m, int64_t n, int64_t k, int64_t group_size, bool bf16, int sm, int sms) {
  if (m < 1 || n < 1 || k < 1) throw py::value_error("plan_for: m, n and k must be at least 1");
  if (sms < 1) throw py::value_error("plan_for: sms (multiprocessors) must be at least 1");
  if (group_size != -1 && group_size != 32 && group_size != 64 && group_size != 128) {
    throw py::value_error("plan_for: group_size must be -1, 32, 64 or 128, got " +
                          std::to_string(group_size));
  }
  const plan::Plan plan = plan::select({m, n, k, group_size, {sm, sms, plan::shared_bytes_of(sm)}});
  const plan::Partition& part = plan.partition;
  py::dict out;
  out["m"] = m;
  out["n"] = n;
  out["k"] = k;
  out["group_size"] = group_size;
  out["dtype"] = bf16 ? "bfloat16" : "float16";
  out["sm"] = sm;
  out["sms"] = sms;
  out["kernel"] = describe(plan.kernel);
  out["blocks"] = part.blocks;
  out["row_tiles"] = part.row_tiles;
  out["token_tiles"] = part.token_tiles;
  out["units_per_tile"] = part.units_per_tile;
  out["units_per_block"] = part.units_per_block;
  out["splits_tiles"] = part.splits_tiles();
  out["workspace_bytes"] = plan.workspace_bytes;
  return out;
}

py::dict build_info() {
  py::dict out;
  out["version"] = MARLIN_VERSION;
  out["cuda"] = MARLIN_CUDA_VERSION;  // empty: built without CUDA kernels
  out["architectures"] = MARLIN_CUDA_ARCHITECTURES;
  out["torch"] = MARLIN_TORCH_VERSION;
  out["build_type"] = MARLIN_BUILD_TYPE;
  out["compiler"] = MARLIN_COMPILER;
  return out;
}

// See csrc/ops/attributes.cpp: 0, or 1 with a message in `error`.
using AttributesFunction = int (*)(int id, int bf16, cuda::KernelAttributes* out, char* error,
                                   size_t error_size);

// The function of the op library that lies beside this module, if it was built with CUDA.
AttributesFunction attributes_function() {
  Dl_info self{};
  if (!dladdr(reinterpret_cast<const void*>(&attributes_function), &self)) return nullptr;
  const auto library = std::filesystem::path(self.dli_fname).parent_path() / "_ops.abi3.so";
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!handle) return nullptr;
  return reinterpret_cast<AttributesFunction>(dlsym(handle, "marlin_kernel_attributes"));
}

py::dict kernel_attributes(int id, bool bf16) {
  const auto ask = attributes_function();
  if (!ask) {
    throw std::runtime_error(
        "kernel_attributes: the op library is not loaded (import marlin first) or was built "
        "without CUDA kernels");
  }
  cuda::KernelAttributes a{};
  char error[512] = "";
  if (ask(id, bf16, &a, error, sizeof error) != 0) {
    throw std::runtime_error(std::string("kernel_attributes: ") + error);
  }
  py::dict out;
  out["registers"] = a.registers;
  out["local_bytes"] = a.local_bytes;
  out["shared_bytes"] = a.shared_bytes;
  out["threads"] = a.threads;
  out["blocks_per_sm"] = a.blocks_per_sm;
  out["binary_version"] = a.binary_version;
  out["ptx_version"] = a.ptx_version;
  return out;
}

}  // namespace
}  // namespace marlin::inspect

PYBIND11_MODULE(_inspect, m) {
  using namespace marlin::inspect;
  m.doc() = "What was built, and what the planner chooses.";
  m.def("plans", &plans, "Every compiled GEMM kernel.");
  m.def("plan_for", &plan_for, py::arg("m"), py::arg("n"), py::arg("k"), py::kw_only(),
        py::arg("group_size") = 128, py::arg("bf16") = false, py::arg("sm") = 90,
        py::arg("sms") = 132, "The kernel and the partition chosen for a problem on a device.");
  m.def("build_info", &build_info, "Versions and settings of this build.");
  m.def("kernel_attributes", &kernel_attributes, py::arg("id"), py::kw_only(),
        py::arg("bf16") = false, "Registers, shared memory and occupancy on the current device.");
}
