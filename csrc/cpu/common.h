// What every file of the CPU library needs: how functions leave it, bfloat16, threads, and scratch memory.

#pragma once

#include <omp.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define FASTPEFT_EXPORT extern "C" __attribute__((visibility("default")))
#define FASTPEFT_INLINE inline __attribute__((always_inline))

// The name of a function of one instruction set: layer_norm_forward becomes fastpeft_layer_norm_forward_avx512.
#define FASTPEFT_JOIN_(name, level) fastpeft_##name##_##level
#define FASTPEFT_JOIN(name, level) FASTPEFT_JOIN_(name, level)
#define FASTPEFT_NAME(name) FASTPEFT_JOIN(name, FASTPEFT_LEVEL)

namespace fastpeft {

using bf16 = uint16_t;  // the upper half of a float

// What an exported function returns.
enum Status : int32_t { kOk = 0, kNoMemory = 1, kOutOfRange = 2 };

template <class T>
FASTPEFT_INLINE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
FASTPEFT_INLINE constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

// Part `index` of `parts`, at least one, of [0, count), sizes differing by one at most.
struct Range {
  int64_t begin, end;
};

FASTPEFT_INLINE Range part_of(int64_t count, int64_t parts, int64_t index) {
  const int64_t base = count / parts, more = count % parts;
  const int64_t begin = index * base + smaller(index, more);
  return {begin, begin + base + (index < more ? 1 : 0)};
}

// Threads worth starting for a number of pieces of work; one if there is nothing to do.
FASTPEFT_INLINE int team(int64_t threads, int64_t pieces) {
  return static_cast<int>(pieces < 1 || threads < 1 ? 1 : smaller(threads, pieces));
}

// Runs work(index) for index in [0, threads), each on a thread of OpenMP's, which torch's own loops share. The runtime
// may have fewer; then one thread does several.
template <class Work>
FASTPEFT_INLINE void parallel(int threads, const Work& work) {
  if (threads <= 1) {
    work(0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int have = omp_get_num_threads();
    for (int index = omp_get_thread_num(); index < threads; index += have) work(index);
  }
}

// A file's own: one that the linker shared could be made of instructions that a lower level's CPU does not have.
namespace {

// Memory at a page's beginning; a large piece in pages of 2 MiB where the system has them, since a product that strides
// through small ones waits for their addresses.
inline void* pages(size_t bytes) {
#if defined(__linux__)
  constexpr size_t kLarge = size_t{2} << 20;
  if (bytes >= kLarge / 4) {
    bytes = (bytes + kLarge - 1) / kLarge * kLarge;
    void* memory = std::aligned_alloc(kLarge, bytes);
    if (memory != nullptr) madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
  }
#endif
  return std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
}

}  // namespace

// Memory of a thread that is kept between calls, so that pages are touched once. A thread has one such buffer a name
// (`Tag`); asking for more than there is replaces it.
template <class Tag>
FASTPEFT_INLINE void* scratch(size_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.memory);
    buffer.memory = pages(bytes);
    buffer.size = buffer.memory == nullptr ? 0 : bytes;
  }
  return buffer.memory;
}

}  // namespace fastpeft
