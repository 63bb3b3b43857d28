// marlin._inspect: what was built and what the planner chooses, as plain Python objects. No torch.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <filesystem>
#include <stdexcept>
#include <string>

#include "cuda/attributes.h"
#include "plan/numbering.h"

namespace py = pybind11;

namespace marlin::inspect {
namespace {

// How blocks of a kernel share tiles: not, in pairs or not, over memory or not, or always over memory.
enum class Shares { kNot, kInPairs, kOverMemory, kAlwaysOverMemory };

// `any_m`: more tokens than a tile holds make several tiles. `rounds`: whether weights that have scales every
// so many columns are rounded to the activations' type.
template <typename Kernel, typename Rounds>
py::dict describe(const Kernel& kernel, const char* family, int stages, int shared_bytes,
                  bool any_m, Shares shares, Rounds&& rounds) {
  py::dict out;
  out["id"] = plan::number_of(kernel);
  out["name"] = kernel.name();
  out["family"] = family;
  out["tokens"] = kernel.tile.tokens;
  out["rows"] = kernel.tile.rows();
  out["stage_k"] = kernel.tile.stage_k();
  out["stages"] = stages;
  out["threads"] = kernel.tile.threads();
  out["shared_bytes"] = shared_bytes;
  out["sparse"] = kernel.tile.sparse;
  out["any_m"] = any_m;
  py::list values;  // that force_plan takes
  if (shares != Shares::kAlwaysOverMemory) values.append(false);
  if (shares != Shares::kNot) values.append(true);
  out["shares"] = values;
  out["shares_over_memory"] = shares == Shares::kOverMemory || shares == Shares::kAlwaysOverMemory;
  out["cuts_tiles"] = false;
  py::list rounded;
  for (const int period : {32, 64, 128}) {
    if (rounds(period)) rounded.append(period);
  }
  out["rounds_groups"] = rounded;
  out["reason"] = kernel.reason;
  return out;
}

py::dict describe(const plan::Kernel& kernel) {
  return describe(kernel, kernel.family, kernel.tile.stages, kernel.tile.shared_bytes(), true,
                  Shares::kNot, [](int) { return false; });
}

py::dict describe(const plan::DecodeKernel& kernel) {  // with scales every 128 columns
  const plan::DecodeTile& tile = kernel.tile;
  py::dict out = describe(kernel, tile.sparse ? "sm90_decode_24" : "sm90_decode", tile.stages(128),
                          tile.shared_bytes(128), tile.many_tokens(),
                          tile.runs ? Shares::kAlwaysOverMemory : Shares::kInPairs,
                          [&](int period) { return tile.scales_weights(period); });
  out["cuts_tiles"] = tile.cuts_tiles();
  return out;
}

py::dict describe(const plan::PrefillKernel& kernel) {
  const plan::PrefillTile& tile = kernel.tile;
  return describe(kernel, tile.sparse ? "sm90_prefill_24" : "sm90_prefill", tile.stages(),
                  tile.shared_bytes(), true, Shares::kOverMemory, [](int) { return true; });
}

py::list plans() {
  py::list out;
  plan::for_each_table([&](const auto& table) {
    for (const auto& kernel : table) out.append(describe(kernel));
  });
  return out;
}

py::dict plan_for(int64_t m, int64_t n, int64_t k, int64_t group_size, bool bf16, bool sparse,
                  int sm, int sms) {
  if (m < 1 || n < 1 || k < 1) throw py::value_error("plan_for: m, n and k must be at least 1");
  // As many features and elements as no tensor has: what follows counts tiles and their stages in ints.
  constexpr int64_t kFeatures = int64_t{1} << 31, kElements = int64_t{1} << 40;
  const auto too_many = [](int64_t a, int64_t b) { return a > kElements / b; };
  if (m >= kFeatures || n >= kFeatures || k >= kFeatures || too_many(m, k) || too_many(n, k) ||
      too_many(m, n)) {
    throw py::value_error(
        "plan_for: m, n and k must be below 2^31 and m * k, n * k and m * n at most 2^40, got m "
        "= " +
        std::to_string(m) + ", n = " + std::to_string(n) + ", k = " + std::to_string(k) +
        "; give the sizes of tensors that fit a GPU");
  }
  if (sms < 1) throw py::value_error("plan_for: sms (multiprocessors) must be at least 1");
  if (group_size != -1 && group_size != 32 && group_size != 64 && group_size != 128) {
    throw py::value_error("plan_for: group_size must be -1, 32, 64 or 128, got " +
                          std::to_string(group_size));
  }
  if (sparse && k % 4 != 0) {
    throw py::value_error("plan_for: k of a 2:4 sparse weight must be a multiple of 4, got " +
                          std::to_string(k));
  }
  const plan::Device device{sm, sms, plan::shared_bytes_of(sm), sm == 90};
  const plan::Problem problem{m, n, k, group_size == -1 ? k : group_size, device, sparse};
  py::dict out;
  out["m"] = m;
  out["n"] = n;
  out["k"] = k;
  out["group_size"] = group_size;
  out["dtype"] = bf16 ? "bfloat16" : "float16";  // makes no difference yet
  out["sparse"] = sparse;
  out["sm"] = sm;
  out["sms"] = sms;
  if (const auto decode = plan::select_decode(problem)) {
    out["kernel"] = describe(decode->kernel);
    out["blocks"] = decode->blocks;
    out["cluster"] = decode->cluster;
    out["shares"] = decode->cluster > 1 || decode->kernel.tile.runs;
    out["early_stages"] = decode->early_stages;
    out["first_stages"] = decode->first_stages;
    out["row_tiles"] = decode->row_tiles;
    out["token_tiles"] = decode->token_tiles;
    out["stages_per_tile"] = decode->stages;
    out["workspace_bytes"] = decode->partial_bytes();
    out["rounds_weights"] = decode->kernel.tile.scales_weights(decode->period);
    return out;
  }
  if (const auto prefill = plan::select_prefill(problem)) {
    out["kernel"] = describe(prefill->kernel);
    out["blocks"] = prefill->blocks;
    out["token_tiles"] = prefill->token_tiles;
    out["row_tiles"] = prefill->row_tiles;
    out["token_group"] = prefill->token_group;
    out["shares"] = prefill->shared_tiles > 0;
    out["shared_tiles"] = prefill->shared_tiles;
    out["stages_per_tile"] = prefill->stages;
    out["workspace_bytes"] = prefill->partial_bytes();
    out["rounds_weights"] = true;
    return out;
  }
  const plan::Plan plan = plan::select(problem);
  const plan::Partition& part = plan.partition;
  out["kernel"] = describe(plan.kernel);
  out["blocks"] = part.blocks;
  out["row_tiles"] = part.row_tiles;
  out["token_tiles"] = part.token_tiles;
  out["units_per_tile"] = part.units_per_tile;
  out["units_per_block"] = part.units_per_block;
  out["splits_tiles"] = part.splits_tiles();
  out["workspace_bytes"] = plan.workspace_bytes;
  out["rounds_weights"] = false;
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

// A function of the op library that lies beside this module (csrc/ops/attributes.cpp).
template <typename Function>
Function op_library_function(const char* name) {
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&build_info), &self)) {
    const auto library = std::filesystem::path(self.dli_fname).parent_path() / "_ops.abi3.so";
    if (void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD)) {
      if (void* function = dlsym(handle, name)) return reinterpret_cast<Function>(function);
    }
  }
  throw std::runtime_error(
      "marlin._inspect: the op library is not loaded (import marlin first) or was built without "
      "CUDA kernels");
}

void throw_if(int failed, const char* error) {
  if (failed) throw std::runtime_error(error);
}

void force_plan(int id, int sms, bool shares) {
  char error[512] = "";
  const auto force =
      op_library_function<int (*)(int, int, int, char*, size_t)>("marlin_force_plan");
  throw_if(force(id, sms, shares, error, sizeof error), error);
}

py::dict kernel_attributes(int id, bool bf16) {
  const auto ask = op_library_function<int (*)(int, int, cuda::KernelAttributes*, char*, size_t)>(
      "marlin_kernel_attributes");
  cuda::KernelAttributes a{};
  char error[512] = "";
  throw_if(ask(id, bf16, &a, error, sizeof error), error);
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
        py::arg("group_size") = 128, py::arg("bf16") = false, py::arg("sparse") = false,
        py::arg("sm"), py::arg("sms"),
        "The kernel and the partition chosen for a problem on a device.");
  m.def("build_info", &build_info, "Versions and settings of this build.");
  m.def(
      "force_plan", &force_plan, py::arg("id") = -1, py::kw_only(), py::arg("sms") = 0,
      py::arg("shares").noconvert() = false,
      "For tests and benchmarks: makes every gemm run one kernel that can, with blocks that share "
      "tiles or not.");
  m.def("kernel_attributes", &kernel_attributes, py::arg("id"), py::kw_only(),
        py::arg("bf16") = false, "Registers, shared memory and occupancy on the current device.");
}
