// Bitwise instructions. PTX ISA, "Logic and Shift Instructions".
#pragma once

#include <cstdint>

namespace marlin::ptx {

// (word & mask) | bits in one LOP3. Written out because the compiler makes two of it when both
// constants are immediates, and LOP3 has room for one.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}

// A value in both halves. As a move, not a multiplication, since instructions on pairs can take a half twice.
__device__ __forceinline__ uint32_t twice(uint16_t value) {
  uint32_t out;
  asm("mov.b32 %0, {%1, %1};" : "=r"(out) : "h"(value));
  return out;
}

// Keeps a value in a register, where the compiler would compute it anew.
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

}  // namespace marlin::ptx
