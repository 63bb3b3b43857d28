// Barriers in shared memory, bulk copies to and from it, flags between blocks, clusters, and programmatic
// dependent launch. PTX ISA, "mbarrier", "cp.async.bulk", "griddepcontrol", sm_90 and later.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace marlin::ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` more of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p; wait%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra "
      "wait%=;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies `bytes` (a multiple of 16) of global memory; both addresses 16-byte aligned.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// Copies a box of a tensor; what lies outside the tensor arrives as zeros.
__device__ __forceinline__ void tensor_copy(uint32_t shared, const CUtensorMap& map, int x, int y,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void tensor_copy(uint32_t shared, const CUtensorMap& map, int x, int y,
                                            int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

// Copies a box of shared memory into a tensor; what lies outside the tensor is dropped. The threads that wrote
// the box call fence_before_copies() first. It may be written again once copies_have_read() has returned in
// the thread that asked for the copy.
__device__ __forceinline__ void tensor_store(const CUtensorMap& map, int x, int y,
                                             uint32_t shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(x), "r"(y), "r"(shared)
      : "memory");
}
__device__ __forceinline__ void copies_have_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// A barrier for the threads of one warpgroup: 2 and on. (0 is __syncthreads.)
__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 2) : "memory");
}

// Barrier `kId` of the block, at which `kThreads` threads meet: those that arrive go on at once, those that
// sync see what the others did before.
template <int kId, int kThreads>
__device__ __forceinline__ void barrier_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
template <int kId, int kThreads>
__device__ __forceinline__ void barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// True in one thread of a warp whose threads all get here, and known to the compiler to be so.
__device__ __forceinline__ bool elect_one() {
  int elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}

// Orders this thread's accesses to shared memory before copies that are asked for later.
__device__ __forceinline__ void fence_before_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- programmatic dependent launch ------------------------------------------------------------

// Waits until the kernels before this one have finished and their writes can be seen.
__device__ __forceinline__ void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel of the stream start, once every block has said so or exited.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// --- between blocks -------------------------------------------------------------------------------

// What this thread wrote, or saw written, before store_release() is seen by whoever has seen `value`.
__device__ __forceinline__ void store_release(uint64_t* to, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// --- clusters -----------------------------------------------------------------------------------

// Two halves of a barrier of the cluster, which orders no memory but barriers that were initialised and
// fenced before it (mbarrier_init_fence). Only where the kernel was launched in clusters: elsewhere ptxas
// makes the first half nothing and the second a __syncthreads, where warps that wait at different
// points wait for ever.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where in the shared memory of a cluster another block has what this one has at `shared`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}

// Arrives at a barrier of another block, as address_in_block().
__device__ __forceinline__ void mbarrier_arrive_in_block(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Stores 16 bytes in another block and counts them on a barrier there; both as address_in_block().
__device__ __forceinline__ void send_to_block(uint32_t to, uint32_t barrier, const float4& value) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(to),
      "r"(barrier), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

}  // namespace marlin::ptx
