// The instructions of csrc/cuda/primitives.cuh on a CPU, so that the kernels themselves run without a GPU.
//
// A block's threads are fibers that one operating-system thread runs in turn; blocks follow one another. What the threads
// of a warp do together (matrix loads and products, shuffles) waits for all 32 and is then done for all of them, by the
// layouts that the PTX manual gives. Beyond results, this finds what a GPU would not say:
//
//   - threads that touch the same shared memory, one of them writing, with no barrier in between;
//   - reading shared memory that was never written, or that an asynchronous copy is still on its way to: a copy arrives
//     only when its thread waits for it;
//   - accesses outside of shared memory or of the tensors that were announced, misaligned ones, and global memory that is
//     written twice in a launch, or read after it was written;
//   - barriers and warp instructions that not every thread reaches, and copies that nobody waits for;
//   - matrix loads whose rows share banks (counted, not refused).
//
// The order in which threads run is drawn from a seed; results must not depend on it.

#pragma once

#include <algorithm>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#define FASTPEFT_DEVICE inline
#define FASTPEFT_KERNEL(threads, blocks) void

namespace fastpeft {

struct Bf16 {};
struct Fp16 {};

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

namespace emulator {

constexpr int kWarpSize = 32;
constexpr int kStack = 256 << 10;
// What a block may have on every GPU from compute capability 8.0 on.
constexpr int kSharedLimit = 99 << 10;
constexpr int kWholeWarp = -1, kManyWarps = -1, kNobody = -2;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that kernels may touch.
struct Range {
  const char* begin;
  const char* end;
  bool writable;
  std::vector<bool> written;  // a flag a byte, for the present launch
};

inline std::vector<Range> ranges;
inline bool anywhere = false;  // all memory may be touched, and only alignment is checked
inline int64_t conflicts = 0;
inline std::vector<int> shared_of_launches;  // bytes
inline uint64_t seed = 0;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  Shared to;
  const void* from;
  int bytes;
  bool valid;
};

struct Fiber {
  int thread = 0;
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  const Barrier* barrier = nullptr;  // what it waits for
  unsigned generation = 0;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

// What a lane brings to an instruction of its warp.
struct Slot {
  const char* instruction = nullptr;
  const void* input[4];
  void* output;
};

struct Warp {
  Barrier barrier;
  unsigned epoch = 0;
  Slot slots[kWarpSize];
};

// The last accesses to four bytes of shared memory.
struct Cell {
  bool ever_written = false, pending = false;
  int writer = kNobody;  // thread
  unsigned write_block = 0, write_warp = 0;
  int reader = kNobody, reader_warp = kNobody;
  unsigned read_block = 0, read_warp = 0;
};

struct Block {
  int64_t index = 0;
  int threads = 0;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned epoch = 1;
  std::string error;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  void (*body)(const void*, const void*) = nullptr;
  const void *kernel = nullptr, *params = nullptr;
};

inline Block block;
inline std::vector<std::unique_ptr<char[]>> stacks;

[[noreturn]] inline void fail(const std::string& what) {
  throw Error(what + " (thread " + std::to_string(block.current->thread) + " of block " + std::to_string(block.index) +
              ")");
}

inline int warp_of(int thread) { return thread / kWarpSize; }
inline Warp& own_warp() { return block.warps[warp_of(block.current->thread)]; }

// Not inlined, as resume is not: what calls setjmp must not keep variables of its callers in registers.
[[gnu::noinline]] inline void yield() {
  if (_setjmp(block.current->state) == 0) _longjmp(block.scheduler, 1);
}

// Waits for all; the last to come runs `work` first.
template <class Work>
void meet(Barrier& barrier, int expected, const Work& work) {
  if (++barrier.arrived == expected) {
    work();
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber* fiber = block.current;
  fiber->barrier = &barrier;
  fiber->generation = barrier.generation;
  while (fiber->generation == barrier.generation) yield();
  fiber->barrier = nullptr;
}

// An instruction of the whole warp, done by the last lane for all of them.
template <class Work>
void together(const char* instruction, const Slot& slot, const Work& work) {
  Warp& warp = own_warp();
  Slot& own = warp.slots[block.current->thread % kWarpSize];
  own = slot;
  own.instruction = instruction;
  meet(warp.barrier, kWarpSize, [&] {
    for (const Slot& other : warp.slots) {
      if (std::strcmp(other.instruction, instruction) != 0) {
        fail(std::string("lanes of a warp meet at ") + instruction + " and " + other.instruction);
      }
    }
    work(warp.slots);
  });
}

inline void check_shared(Shared address, int bytes) {
  if (address % bytes != 0) fail("shared address " + std::to_string(address) + " is not aligned");
  if (address + bytes > block.shared.size()) fail("shared address " + std::to_string(address) + " is outside");
}

[[gnu::noinline]] inline void note_write(Shared address, int bytes) {
  check_shared(address, bytes);
  const int thread = block.current->thread, warp = warp_of(thread);
  const unsigned epoch = block.warps[warp].epoch;
  for (Shared a = address / 4; a < (address + bytes + 3) / 4; ++a) {
    Cell& cell = block.cells[a];
    const std::string where = "shared address " + std::to_string(4 * a);
    if (cell.pending) fail(where + " is written while a copy is on its way to it");
    if (cell.ever_written && cell.write_block == block.epoch && cell.writer != thread &&
        !(warp_of(cell.writer) == warp && cell.write_warp < epoch)) {
      fail(where + " is written after thread " + std::to_string(cell.writer) + " wrote it, with no barrier in between");
    }
    if (cell.read_block == block.epoch && cell.reader != thread &&
        !(cell.reader_warp == warp && cell.read_warp < epoch)) {
      fail(where + " is written after others read it, with no barrier in between");
    }
    cell.ever_written = true;
    cell.writer = thread;
    cell.write_block = block.epoch;
    cell.write_warp = epoch;
  }
}

// reader: a thread, or kWholeWarp for all threads of the present one's warp.
[[gnu::noinline]] inline void note_read(Shared address, int bytes, int reader) {
  check_shared(address, bytes);
  const int warp = warp_of(block.current->thread);
  const unsigned epoch = block.warps[warp].epoch;
  for (Shared a = address / 4; a < (address + bytes + 3) / 4; ++a) {
    Cell& cell = block.cells[a];
    const std::string where = "shared address " + std::to_string(4 * a);
    if (cell.pending) fail(where + " is read while a copy is on its way to it");
    if (!cell.ever_written) fail(where + " is read but was never written");
    if (cell.write_block == block.epoch && cell.writer != reader &&
        !(warp_of(cell.writer) == warp && cell.write_warp < epoch)) {
      fail(where + " is read after thread " + std::to_string(cell.writer) + " wrote it, with no barrier in between");
    }
    if (cell.read_block != block.epoch) {
      cell.read_block = block.epoch;
      cell.reader = reader;
      cell.reader_warp = warp;
    } else {
      if (cell.reader != reader) cell.reader = kWholeWarp;
      if (cell.reader_warp != warp) cell.reader_warp = kManyWarps;
    }
    cell.read_warp = epoch;
  }
}

[[gnu::noinline]] inline void check_global(const void* address, int bytes, bool write) {
  const char* begin = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a global address is not aligned");
  if (anywhere) return;
  for (Range& range : ranges) {
    if (begin < range.begin || begin + bytes > range.end) continue;
    if (write && !range.writable) fail("an input is written");
    if (range.writable) {
      for (int i = 0; i < bytes; ++i) {
        const size_t offset = begin - range.begin + i;
        if (range.written[offset]) fail(write ? "a result is written twice" : "a result is read in its own launch");
        if (write) range.written[offset] = true;
      }
    }
    return;
  }
  fail(std::string("a global address is outside of every tensor: ") + (write ? "write" : "read"));
}

// A kernel's thread on its own stack.
inline void fiber_main() {
  try {
    block.body(block.kernel, block.params);
    if (!block.current->uncommitted.empty() || !block.current->groups.empty()) {
      fail("a thread ends before its copies have arrived");
    }
  } catch (const std::exception& error) {
    if (block.error.empty()) block.error = error.what();
  }
  block.current->done = true;
  _longjmp(block.scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  block.current = &fiber;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Not inlined either: getcontext is like setjmp.
[[gnu::noinline]] inline void prepare(Fiber& fiber, char* stack) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
}

inline void run_block(std::mt19937_64& random, int64_t index, int threads, int shared_bytes) {
  block.index = index;
  block.threads = threads;
  block.shared.assign(shared_bytes, 0xff);  // NaN in every type
  block.cells.assign((shared_bytes + 3) / 4, Cell());
  block.warps.assign(threads / kWarpSize, Warp());
  block.fibers.assign(threads, Fiber());
  block.barrier = Barrier();
  block.epoch = 1;
  block.error.clear();
  while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[kStack]);
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) {
    block.fibers[t].thread = t;
    prepare(block.fibers[t], stacks[t].get());
    order[t] = seed == 1 ? threads - 1 - t : t;
  }
  for (int left = threads; left > 0;) {
    if (seed > 1) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (int t : order) {
      Fiber& fiber = block.fibers[t];
      if (fiber.done || (fiber.barrier != nullptr && fiber.generation == fiber.barrier->generation)) continue;
      resume(fiber);
      moved = true;
      if (!block.error.empty()) throw Error(block.error);
      if (fiber.done) --left;
    }
    if (!moved) throw Error("threads wait for others that never come (block " + std::to_string(index) + ")");
  }
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class T>
uint16_t rounded(float value);

template <>
inline uint16_t rounded<Bf16>(float value) {
  const uint32_t bits = as_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <>
inline uint16_t rounded<Fp16>(float value) {
  const uint16_t sign = static_cast<uint16_t>(as_bits(value) >> 16 & 0x8000);
  const double size = std::fabs(static_cast<double>(value));
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0) return sign | 0x7c00;
  if (size < 0x1p-25) return sign;
  // The unit in the last place; nearbyint rounds ties to even.
  const int exponent = std::max(std::ilogb(size), -14);
  const double unit = std::ldexp(1.0, exponent - 10);
  const double rounded_size = std::nearbyint(size / unit) * unit;
  if (rounded_size < 0x1p-14) return sign | static_cast<uint16_t>(rounded_size * 0x1p24);
  const int top = std::ilogb(rounded_size);
  const auto fraction = static_cast<uint16_t>((rounded_size / std::ldexp(1.0, top) - 1.0) * 1024.0);
  return sign | static_cast<uint16_t>((top + 15) << 10) | fraction;
}

template <class T>
float widened(uint16_t bits);

template <>
inline float widened<Bf16>(uint16_t bits) {
  return as_float(static_cast<uint32_t>(bits) << 16);
}

template <>
inline float widened<Fp16>(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return static_cast<float>(bits & 0x8000 ? -value : value);
}

template <class T>
float half_of(uint32_t word, int half) {
  return widened<T>(static_cast<uint16_t>(half ? word >> 16 : word));
}

[[gnu::noinline]] inline void load_matrices(uint32_t (&r)[4], Shared address, bool transposed) {
  Slot slot{};
  slot.input[0] = &address;
  slot.output = r;
  together(transposed ? "load_matrices_transposed" : "load_matrices", slot, [&](Slot* slots) {
    uint16_t matrices[4][8][8];
    for (int j = 0; j < 4; ++j) {
      unsigned groups = 0;
      for (int row = 0; row < 8; ++row) {
        const Shared from = *static_cast<const Shared*>(slots[8 * j + row].input[0]);
        note_read(from, 16, kWholeWarp);
        std::memcpy(matrices[j][row], &block.shared[from], 16);
        groups |= 1u << (from / 16 % 8);
      }
      conflicts += 8 - __builtin_popcount(groups);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int j = 0; j < 4; ++j) {
        const int a = lane / 4, b = lane % 4 * 2;
        const uint32_t low = transposed ? matrices[j][b][a] : matrices[j][a][b];
        const uint32_t high = transposed ? matrices[j][b + 1][a] : matrices[j][a][b + 1];
        static_cast<uint32_t*>(slots[lane].output)[j] = low | high << 16;
      }
    }
  });
}

[[gnu::noinline]] inline void copy_async(Shared to, const void* from, int bytes, bool valid) {
  note_write(to, bytes);
  if (valid) check_global(from, bytes, false);
  for (Shared a = to / 4; a < (to + bytes) / 4; ++a) block.cells[a].pending = true;
  std::memset(&block.shared[to], 0xff, bytes);
  block.current->uncommitted.push_back({to, from, bytes, valid});
}

[[gnu::noinline]] inline void arrive(const Copy& copy) {
  for (Shared a = copy.to / 4; a < (copy.to + copy.bytes) / 4; ++a) block.cells[a].pending = false;
  note_write(copy.to, copy.bytes);
  if (copy.valid) {
    std::memcpy(&block.shared[copy.to], copy.from, copy.bytes);
  } else {
    std::memset(&block.shared[copy.to], 0, copy.bytes);
  }
}

}  // namespace emulator

inline int thread_index() { return emulator::block.current->thread; }
inline int64_t block_index() { return emulator::block.index; }
inline Shared shared_memory() { return 0; }

[[gnu::noinline]] inline void block_sync() {
  emulator::meet(emulator::block.barrier, emulator::block.threads, [] { ++emulator::block.epoch; });
}

[[gnu::noinline]] inline void warp_sync() {
  emulator::together("warp_sync", emulator::Slot{}, [](emulator::Slot*) { ++emulator::own_warp().epoch; });
}

[[gnu::noinline]] inline float shuffle_xor(float value, int mask) {
  float result = 0.0f;
  emulator::Slot slot{};
  slot.input[0] = &value;
  slot.input[1] = &mask;
  slot.output = &result;
  emulator::together("shuffle_xor", slot, [](emulator::Slot* slots) {
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int from = lane ^ *static_cast<const int*>(slots[lane].input[1]);
      *static_cast<float*>(slots[lane].output) = *static_cast<const float*>(slots[from].input[0]);
    }
  });
  return result;
}

inline void copy_async_16(Shared to, const void* from, bool valid) { emulator::copy_async(to, from, 16, valid); }
inline void copy_async_8(Shared to, const void* from, bool valid) { emulator::copy_async(to, from, 8, valid); }

inline void copy_commit() {
  emulator::Fiber* fiber = emulator::block.current;
  fiber->groups.push_back(std::move(fiber->uncommitted));
  fiber->uncommitted.clear();
}

template <int PENDING>
void copy_wait() {
  auto& groups = emulator::block.current->groups;
  while (groups.size() > PENDING) {
    for (const emulator::Copy& copy : groups.front()) emulator::arrive(copy);
    groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&r)[4], Shared address) { emulator::load_matrices(r, address, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], Shared address) { emulator::load_matrices(r, address, true); }

template <class T>
[[gnu::noinline]] void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Slot slot{};
  slot.input[0] = a;
  slot.input[1] = &b0;
  slot.input[2] = &b1;
  slot.output = c;
  emulator::together("mma", slot, [](emulator::Slot* slots) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const auto* a = static_cast<const uint32_t*>(slots[lane].input[0]);
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][2 * t + half + i / 2 * 8] = emulator::half_of<T>(a[i], half);
        right[2 * t + half][g] = emulator::half_of<T>(*static_cast<const uint32_t*>(slots[lane].input[1]), half);
        right[2 * t + half + 8][g] = emulator::half_of<T>(*static_cast<const uint32_t*>(slots[lane].input[2]), half);
      }
    }
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      auto* c = static_cast<float*>(slots[lane].output);
      for (int i = 0; i < 4; ++i) {
        double sum = 0.0;
        for (int k = 0; k < 16; ++k) {
          sum += static_cast<double>(left[g + i / 2 * 8][k]) * static_cast<double>(right[k][2 * t + i % 2]);
        }
        c[i] = static_cast<float>(c[i] + sum);
      }
    }
  });
}

template <class T>
uint32_t pack(float low, float high) {
  return emulator::rounded<T>(low) | static_cast<uint32_t>(emulator::rounded<T>(high)) << 16;
}

template <class T>
Float2 unpack(uint32_t word) {
  return {emulator::half_of<T>(word, 0), emulator::half_of<T>(word, 1)};
}

template <class V>
void shared_store(Shared address, V value) {
  emulator::note_write(address, sizeof(V));
  std::memcpy(&emulator::block.shared[address], &value, sizeof(V));
}

template <class V>
V shared_load(Shared address) {
  emulator::note_read(address, sizeof(V), thread_index());
  V value;
  std::memcpy(&value, &emulator::block.shared[address], sizeof(V));
  return value;
}

inline uint32_t shared_load_word(Shared address) { return shared_load<uint32_t>(address); }
inline Word4 shared_load_word4(Shared address) { return shared_load<Word4>(address); }
inline Float4 shared_load_float4(Shared address) { return shared_load<Float4>(address); }

template <class V>
V global_load(const void* address) {
  emulator::check_global(address, sizeof(V), false);
  V value;
  std::memcpy(&value, address, sizeof(V));
  return value;
}

template <class V>
void global_store(void* address, V value) {
  emulator::check_global(address, sizeof(V), true);
  std::memcpy(address, &value, sizeof(V));
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void*, const Params& params) {
  using namespace emulator;
  if (shared_bytes > kSharedLimit) {
    throw Error(std::to_string(shared_bytes) + " bytes of shared memory are more than a block may have");
  }
  shared_of_launches.push_back(shared_bytes);
  std::mt19937_64 random(seed);
  for (Range& range : ranges) range.written.assign(range.end - range.begin, false);
  block.kernel = reinterpret_cast<const void*>(&kernel);
  block.params = &params;
  block.body = [](const void* kernel, const void* params) {
    (*static_cast<void (*const*)(Params)>(kernel))(*static_cast<const Params*>(params));
  };
  for (int64_t index = 0; index < blocks; ++index) run_block(random, index, threads, shared_bytes);
}

}  // namespace fastpeft
