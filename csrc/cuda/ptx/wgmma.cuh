// Warpgroup matrix instructions. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace marlin::ptx {

// Orders this warpgroup's register accesses before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The low half of a shared-memory descriptor of operand B: rows of 128 bytes (64 columns), 128-byte swizzle, groups of
// eight rows 1024 bytes apart; `address` that of any row, plus 32 times the k16 step. (The swizzle goes by
// the address, and its pattern begins at multiples of 1024, wherever the first row is: base offset 0.)
__device__ __forceinline__ uint32_t wgmma_descriptor_low(uint32_t address) {
  constexpr uint32_t kIgnored = 1 << 16;  // the leading offset, unused with this swizzle
  return kIgnored | (address >> 4 & 0x3fff);
}
// The descriptor: its high half is the same for all. Kernels compute the low half of a stage's alone, since 64-bit
// arithmetic would take an instruction more.
__device__ __forceinline__ uint64_t wgmma_descriptor_of(uint32_t low) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroupStride = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kGroupStride | low;
}

// d[64 x kTokens] = a[64 x 16] b[16 x kTokens] + (accumulate ? d : 0), A from registers.
template <typename Element, int kTokens>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[kTokens / 2], const uint32_t (&a)[4],
                                             uint64_t b, bool accumulate);

// d[64 x kTokens] = a[64 x 32] b[32 x kTokens] + (accumulate ? d : 0), where of every four neighbouring
// columns of A two are stored, from registers as those of m64k16. `places` says which: of four
// neighbouring threads the first two tell it if kSelector is 0, the others if it is 1 (layout/sparse.h).
template <typename Element, int kTokens, int kSelector>
__device__ __forceinline__ void wgmma_sparse_m64k32(float (&d)[kTokens / 2], const uint32_t (&a)[4],
                                                    uint32_t places, uint64_t b, bool accumulate);

// The accumulators of one instruction, four at a time: as operands, and as their names.
#define MARLIN_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MARLIN_D8(i) MARLIN_D4(i), MARLIN_D4(i + 4)
#define MARLIN_D16(i) MARLIN_D8(i), MARLIN_D8(i + 8)
#define MARLIN_D32(i) MARLIN_D16(i), MARLIN_D16(i + 16)

#define MARLIN_NAMES_4 "%0, %1, %2, %3"
#define MARLIN_NAMES_8 MARLIN_NAMES_4 ", %4, %5, %6, %7"
#define MARLIN_NAMES_12 MARLIN_NAMES_8 ", %8, %9, %10, %11"
#define MARLIN_NAMES_16 MARLIN_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MARLIN_NAMES_20 MARLIN_NAMES_16 ", %16, %17, %18, %19"
#define MARLIN_NAMES_24 MARLIN_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MARLIN_NAMES_32 MARLIN_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLIN_NAMES_40 MARLIN_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MARLIN_NAMES_48 MARLIN_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MARLIN_NAMES_56 MARLIN_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MARLIN_NAMES_64 MARLIN_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MARLIN_NAMES_72 MARLIN_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MARLIN_NAMES_80 MARLIN_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MARLIN_NAMES_88 MARLIN_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MARLIN_NAMES_96 MARLIN_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MARLIN_NAMES_104 MARLIN_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MARLIN_NAMES_112 MARLIN_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define MARLIN_NAMES_128                             \
  MARLIN_NAMES_112                                   \
  ", %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"

// One instruction for one type. `inputs` names what follows the accumulators: A, B's descriptor; then
// come the predicate and, for sparse weights only, the places.
#define MARLIN_WGMMA_DENSE(element, type, tokens, names, inputs, predicate, where, ...)          \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma_m64k16<element, tokens>(                                 \
      float(&d)[tokens / 2], const uint32_t(&a)[4], uint64_t b, bool accumulate) {               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " predicate                                      \
                 ", 0;"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type " {" names \
                 "}, " inputs ", p, 1, 1, 0;}"                                                   \
                 : __VA_ARGS__                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                           \
                   "r"(static_cast<int>(accumulate)));                                           \
  }

#define MARLIN_WGMMA_SPARSE(element, type, selector, tokens, names, inputs, predicate, where, ...) \
  template <>                                                                                      \
  __device__ __forceinline__ void wgmma_sparse_m64k32<element, tokens, selector>(                  \
      float(&d)[tokens / 2], const uint32_t(&a)[4], uint32_t places, uint64_t b,                   \
      bool accumulate) {                                                                           \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " predicate                                        \
                 ", 0;"                                                                            \
                 "wgmma.mma_async.sp.sync.aligned.m64n" #tokens "k32.f32." type "." type           \
                 " {" names "}, " inputs ", " where ", " #selector ", p, 1, 1, 0;}"                \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                   "r"(static_cast<int>(accumulate)), "r"(places));                                \
  }

#define MARLIN_WGMMA_OF(element, type, ...)          \
  MARLIN_WGMMA_DENSE(element, type, __VA_ARGS__)     \
  MARLIN_WGMMA_SPARSE(element, type, 0, __VA_ARGS__) \
  MARLIN_WGMMA_SPARSE(element, type, 1, __VA_ARGS__)

#define MARLIN_WGMMA(...)                     \
  MARLIN_WGMMA_OF(__half, "f16", __VA_ARGS__) \
  MARLIN_WGMMA_OF(__nv_bfloat16, "bf16", __VA_ARGS__)

// clang-format off
MARLIN_WGMMA(8, MARLIN_NAMES_4, "{%4, %5, %6, %7}, %8", "%9", "%10", MARLIN_D4(0))
MARLIN_WGMMA(16, MARLIN_NAMES_8, "{%8, %9, %10, %11}, %12", "%13", "%14", MARLIN_D8(0))
MARLIN_WGMMA(24, MARLIN_NAMES_12, "{%12, %13, %14, %15}, %16", "%17", "%18", MARLIN_D8(0), MARLIN_D4(8))
MARLIN_WGMMA(32, MARLIN_NAMES_16, "{%16, %17, %18, %19}, %20", "%21", "%22", MARLIN_D16(0))
MARLIN_WGMMA(40, MARLIN_NAMES_20, "{%20, %21, %22, %23}, %24", "%25", "%26", MARLIN_D16(0), MARLIN_D4(16))
MARLIN_WGMMA(48, MARLIN_NAMES_24, "{%24, %25, %26, %27}, %28", "%29", "%30", MARLIN_D16(0), MARLIN_D8(16))
MARLIN_WGMMA(64, MARLIN_NAMES_32, "{%32, %33, %34, %35}, %36", "%37", "%38", MARLIN_D32(0))
MARLIN_WGMMA(80, MARLIN_NAMES_40, "{%40, %41, %42, %43}, %44", "%45", "%46", MARLIN_D32(0), MARLIN_D8(32))
MARLIN_WGMMA(96, MARLIN_NAMES_48, "{%48, %49, %50, %51}, %52", "%53", "%54", MARLIN_D32(0), MARLIN_D16(32))
MARLIN_WGMMA(112, MARLIN_NAMES_56, "{%56, %57, %58, %59}, %60", "%61", "%62", MARLIN_D32(0), MARLIN_D16(32), MARLIN_D8(48))
MARLIN_WGMMA(128, MARLIN_NAMES_64, "{%64, %65, %66, %67}, %68", "%69", "%70", MARLIN_D32(0), MARLIN_D32(32))
MARLIN_WGMMA(144, MARLIN_NAMES_72, "{%72, %73, %74, %75}, %76", "%77", "%78", MARLIN_D32(0), MARLIN_D32(32), MARLIN_D8(64))
MARLIN_WGMMA(160, MARLIN_NAMES_80, "{%80, %81, %82, %83}, %84", "%85", "%86", MARLIN_D32(0), MARLIN_D32(32), MARLIN_D16(64))
MARLIN_WGMMA(176, MARLIN_NAMES_88, "{%88, %89, %90, %91}, %92", "%93", "%94", MARLIN_D32(0), MARLIN_D32(32), MARLIN_D16(64), MARLIN_D8(80))
MARLIN_WGMMA(192, MARLIN_NAMES_96, "{%96, %97, %98, %99}, %100", "%101", "%102", MARLIN_D32(0), MARLIN_D32(32), MARLIN_D32(64))
MARLIN_WGMMA(208, MARLIN_NAMES_104, "{%104, %105, %106, %107}, %108", "%109", "%110", MARLIN_D32(0), MARLIN_D32(32), MARLIN_D32(64), MARLIN_D8(96))
MARLIN_WGMMA(224, MARLIN_NAMES_112, "{%112, %113, %114, %115}, %116", "%117", "%118", MARLIN_D32(0), MARLIN_D32(32), MARLIN_D32(64), MARLIN_D16(96))
MARLIN_WGMMA(256, MARLIN_NAMES_128, "{%128, %129, %130, %131}, %132", "%133", "%134", MARLIN_D32(0), MARLIN_D32(32), MARLIN_D32(64), MARLIN_D32(96))
// clang-format on

#undef MARLIN_WGMMA
#undef MARLIN_WGMMA_OF
#undef MARLIN_WGMMA_SPARSE
#undef MARLIN_WGMMA_DENSE
#undef MARLIN_NAMES_128
#undef MARLIN_NAMES_112
#undef MARLIN_NAMES_104
#undef MARLIN_NAMES_96
#undef MARLIN_NAMES_88
#undef MARLIN_NAMES_80
#undef MARLIN_NAMES_72
#undef MARLIN_NAMES_64
#undef MARLIN_NAMES_56
#undef MARLIN_NAMES_48
#undef MARLIN_NAMES_40
#undef MARLIN_NAMES_32
#undef MARLIN_NAMES_24
#undef MARLIN_NAMES_20
#undef MARLIN_NAMES_16
#undef MARLIN_NAMES_12
#undef MARLIN_NAMES_8
#undef MARLIN_NAMES_4
#undef MARLIN_D32
#undef MARLIN_D16
#undef MARLIN_D8
#undef MARLIN_D4

// Hands registers from one warpgroup to another: the block's were shared out evenly at its launch.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores four 8x8 matrices of 16-bit values, each transposed: `rows` is the address of row lane % 8 of
// matrix lane / 8; a fragment's register i holds matrix i.
__device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

}  // namespace marlin::ptx
