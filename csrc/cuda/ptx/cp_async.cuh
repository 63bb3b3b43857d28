// Asynchronous copies from global to shared memory. PTX ISA, "Data Movement and Conversion
// Instructions: cp.async", sm_80 and later.
#pragma once

#include <cstdint>

namespace marlin::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A value at an address of shared memory.
template <typename Value>
__device__ __forceinline__ Value load_shared(uint32_t address) {
  return *static_cast<const Value*>(__cvta_shared_to_generic(address));
}

template <typename Value>
__device__ __forceinline__ void store_shared(uint32_t address, const Value& value) {
  *static_cast<Value*>(__cvta_shared_to_generic(address)) = value;
}

// Copies 16 bytes, past L1; writes zeros, and reads nothing, where not `valid`.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace marlin::ptx
