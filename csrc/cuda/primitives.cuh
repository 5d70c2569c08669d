// The few instructions that the kernels are made of: everything that a CPU does not have, and nothing else.
//
// tests/cuda/emulator.h has the same names for a CPU. With FASTPEFT_EMULATE defined it takes this file's place, and the
// very same kernels run there, thread by thread, with every access to memory checked.

#pragma once

#ifdef FASTPEFT_EMULATE

#include "emulator.h"

#else

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define FASTPEFT_DEVICE __device__ __forceinline__
// Threads a block, and how many blocks a multiprocessor should hold (which bounds the registers).
#define FASTPEFT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fastpeft {

// Element types: bf16 and fp16 are both 16 bits that only the instructions below look into.
struct Bf16 {};
struct Fp16 {};

// Address in shared memory, in bytes.
using Shared = uint32_t;

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};

FASTPEFT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTPEFT_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }

// The block's dynamic shared memory, aligned to 128 bytes.
FASTPEFT_DEVICE Shared shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

// All threads of the block have come here, and see what the others wrote before.
FASTPEFT_DEVICE void block_sync() { __syncthreads(); }

// The same for the 32 threads of a warp.
FASTPEFT_DEVICE void warp_sync() { __syncwarp(); }

// The value that the thread `lane ^ mask` of this warp has.
FASTPEFT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Starts a copy of 16 bytes from global to shared memory, or of 16 zero bytes where the source is not valid (it is then
// not read). Both addresses are multiples of 16.
FASTPEFT_DEVICE void copy_async_16(Shared to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// The same with 8 bytes.
FASTPEFT_DEVICE void copy_async_8(Shared to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(to), "l"(from), "r"(valid ? 8 : 0) : "memory");
}

// Copies that this thread started since the last call are one group.
FASTPEFT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// This thread's copies have arrived, except those of its `PENDING` newest groups. Other threads see them after a
// block_sync.
template <int PENDING>
FASTPEFT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory. Threads 8j to 8j + 7 give the addresses of the rows of
// matrix j, 16 bytes each. Thread l gets in r[j] the elements (l / 4, 2 (l % 4)) and, in the upper half, the one right
// of it.
FASTPEFT_DEVICE void load_matrices(uint32_t (&r)[4], Shared address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: thread l gets the elements (2 (l % 4), l / 4) and the one below it.
FASTPEFT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b on the tensor cores: a is 16 x 16, b is 16 x 8, c is 16 x 8 in fp32. mma.cuh says which thread holds what.
template <class T>
FASTPEFT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FASTPEFT_DEVICE void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FASTPEFT_DEVICE void mma<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to T (to nearest, ties to even), the first in the lower half.
template <class T>
FASTPEFT_DEVICE uint32_t pack(float low, float high);

template <>
FASTPEFT_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <>
FASTPEFT_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The two numbers of a word, the lower half first.
template <class T>
FASTPEFT_DEVICE Float2 unpack(uint32_t word);

template <>
FASTPEFT_DEVICE Float2 unpack<Bf16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <>
FASTPEFT_DEVICE Float2 unpack<Fp16>(uint32_t word) {
  Float2 pair;
  asm("{.reg .f16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;}\n"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
}

FASTPEFT_DEVICE void shared_store(Shared address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(word) : "memory");
}

FASTPEFT_DEVICE void shared_store(Shared address, Float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

FASTPEFT_DEVICE uint32_t shared_load_word(Shared address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(word) : "r"(address) : "memory");
  return word;
}

FASTPEFT_DEVICE Word4 shared_load_word4(Shared address) {
  Word4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

FASTPEFT_DEVICE Float4 shared_load_float4(Shared address) {
  Float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// One value of 2, 4, 8 or 16 bytes, aligned to its size.
template <class V>
FASTPEFT_DEVICE V global_load(const void* address) {
  return *static_cast<const V*>(address);
}

template <class V>
FASTPEFT_DEVICE void global_store(void* address, V value) {
  *static_cast<V*>(address) = value;
}

// 2^x to about two units in the last place; 0 for -infinity.
FASTPEFT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to about one unit in the last place; 0 for infinity.
FASTPEFT_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Starts a kernel of one parameter structure on the current device.
template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void* stream, const Params& params) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) {
    throw std::runtime_error("fastpeft_cuda: " + std::to_string(blocks) + " blocks are more than a grid holds");
  }
  cudaError_t error = cudaSuccess;
  if (shared_bytes > (48 << 10)) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared_bytes);
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fastpeft_cuda: a kernel could not be started: ") + cudaGetErrorString(error));
  }
}

}  // namespace fastpeft

#endif
