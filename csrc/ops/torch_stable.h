// Everything this project needs of LibTorch's stable ABI, and its quirks, in one place. Target: 2.11
// (TORCH_TARGET_VERSION is set by CMake), so one binary serves every later torch and every Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "marlin/marlin.h"

// Declared by torch only under USE_CUDA, whose other declarations need CUDA's headers. Weak, so that
// the library also loads under a torch built without CUDA, where the symbol does not exist.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace marlin::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws what Python sees as a RuntimeError. Not torch's STD_TORCH_CHECK: that puts a C++ function, a
// file and a line before the message.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define MARLIN_CHECK(condition, ...)                    \
  do {                                                  \
    if (!(condition)) ::marlin::ops::fail(__VA_ARGS__); \
  } while (false)

inline void* current_stream(int32_t device_index) {
  MARLIN_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
               "marlin: a CUDA tensor was given, but this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

// torch's own thread pool.
inline void torch_parallel_for(int64_t count, int64_t grain, const cpu::Body& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

inline std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline DType dtype_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

inline Tensor to_cpu(const Tensor& t) {
  if (t.is_cpu()) return t;
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

}  // namespace marlin::ops
