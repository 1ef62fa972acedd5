// The PTX of compute capability 9.0 that factor_attention.cuh is written in. The tests replace this file by one that
// does the same on a CPU (tests/kernels/emulator/device.cuh).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FLR_DEVICE __device__ __forceinline__
#define FLR_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

namespace flr {

// Two 16-bit floats in a register, the first in the low half; and the tensor core's C += A B, [16, 16] by [16, 8].
// kScale: weights in [0, 1] are multiplied by it before they are rounded, so that float16's are not subnormal.
struct Bfloat16 {
  static constexpr float kScale = 1;
  static FLR_DEVICE uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static FLR_DEVICE float2 unpack(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  static FLR_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  // C += A B, [16, 8] by [8, 8].
  static FLR_DEVICE void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b0));
  }
};

struct Float16 {
  static constexpr float kScale = 16384;
  static FLR_DEVICE uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static FLR_DEVICE float2 unpack(uint32_t pair) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
  static FLR_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

FLR_DEVICE float exp2_fast(float x) {  // relative error 2^-22
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FLR_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A barrier in shared memory that counts arrivals and bytes of bulk copies.
struct alignas(8) Mbarrier {
  uint64_t bits;
};
FLR_DEVICE void mbar_init(Mbarrier* m, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(m)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copies' proxy; a barrier of the block has to follow.
FLR_DEVICE void mbar_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
FLR_DEVICE void mbar_expect(Mbarrier* m, uint32_t bytes) {  // one arrival, and so many bytes to come
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(m)), "r"(bytes)
               : "memory");
}
FLR_DEVICE void mbar_arrive(Mbarrier* m) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(m)) : "memory");
}
FLR_DEVICE void mbar_wait(Mbarrier* m, uint32_t parity) {  // until the phase of that parity is over
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\n"
      "bra again;\nover:\n}" ::"r"(shared_address(m)),
      "r"(parity)
      : "memory");
}
// An arrival at a barrier of another block of the cluster, which sees then what this thread has written there; and the
// wait for such arrivals.
FLR_DEVICE void mbar_arrive_remote(Mbarrier* m, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(m)),
      "r"(rank)
      : "memory");
}
FLR_DEVICE void mbar_wait_remote(Mbarrier* m, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}" ::"r"(shared_address(m)),
      "r"(parity)
      : "memory");
}
// Global to shared memory, asynchronously; both addresses and the size are multiples of 16 bytes.
FLR_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, Mbarrier* m) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(m))
               : "memory");
}

// Shared to global memory, asynchronously, of this thread's; and its waits for all of them: until they are read, and
// until they are written. What they read was written before a fence_async of who wrote it.
FLR_DEVICE void bulk_store(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
FLR_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
FLR_DEVICE void bulk_wait_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
FLR_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int id, int threads>
FLR_DEVICE void bar_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

FLR_DEVICE float shuffle_xor(float x, int step) { return __shfl_xor_sync(0xffffffffu, x, step); }
FLR_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FLR_DEVICE uint32_t shuffle(uint32_t x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FLR_DEVICE unsigned ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
FLR_DEVICE int ones(unsigned x) { return __popc(x); }

// Four [8, 8] matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
template <bool transposed>
FLR_DEVICE void ldmatrix(uint32_t (&r)[4], const uint16_t* row) {
  if (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// The other way, and the same of the first two matrices alone.
template <bool transposed>
FLR_DEVICE void stmatrix(uint16_t* row, const uint32_t (&r)[4]) {
  if (transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
}
FLR_DEVICE void stmatrix_2_transposed(uint16_t* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1])
               : "memory");
}

FLR_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Of all threads of the cluster's blocks that have not exited; by whole warps.
FLR_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What lies at p in the shared memory of another block of the cluster.
template <class T>
FLR_DEVICE T* remote(T* p, unsigned rank) {
  T* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
}

// Registers of each thread from here on, for all warps of a warpgroup; what some give up others can take.
template <int count>
FLR_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
FLR_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace flr
