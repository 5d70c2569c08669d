// What the CPU and the operating system together can run, asked at run time so that one build serves every machine.
//
// A bit is set only where the instructions may really be used: the CPU has them, the operating system saves their
// registers, and for AMX the kernel grants the tile registers to processes that ask.

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FASTPEFT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// The order is the interface: fastpeft/_native.py names the bits.
enum Feature : uint64_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kAvx512f = 1u << 2,
  kAvx512bw = 1u << 3,
  kAvx512dq = 1u << 4,
  kAvx512vl = 1u << 5,
  kAvx512Bf16 = 1u << 6,
  kAmxTile = 1u << 7,
  kAmxBf16 = 1u << 8,
};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the leaf does not exist
  return r;
}

bool bit(uint32_t value, int position) { return (value >> position) & 1u; }

// Register sets that the operating system saves at a context switch (XCR0). Needs OSXSAVE.
uint64_t saved_registers() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

#if defined(__linux__)

constexpr long kTileData = 18;  // the kernel's number for the AMX tile registers
constexpr long kGetSupported = 0x1021, kRequestPermission = 0x1023;

bool kernel_grants_amx() {
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &supported) == 0 && ((supported >> kTileData) & 1);
}

bool request_amx() { return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0; }

#else

bool kernel_grants_amx() { return false; }
bool request_amx() { return false; }

#endif

uint64_t detect() {
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), extended1 = cpuid(7, 1);
  if (!bit(basic.ecx, 27)) return 0;  // OSXSAVE
  const uint64_t saved = saved_registers();
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;
  const bool tiles = (saved & 0x60000) == 0x60000 && kernel_grants_amx();

  uint64_t found = 0;
  if (ymm && bit(extended.ebx, 5)) found |= kAvx2;
  if (ymm && bit(basic.ecx, 12)) found |= kFma;
  if (zmm && bit(extended.ebx, 16)) found |= kAvx512f;
  if (zmm && bit(extended.ebx, 30)) found |= kAvx512bw;
  if (zmm && bit(extended.ebx, 17)) found |= kAvx512dq;
  if (zmm && bit(extended.ebx, 31)) found |= kAvx512vl;
  if (zmm && bit(extended1.eax, 5)) found |= kAvx512Bf16;
  if (tiles && bit(extended.edx, 24)) found |= kAmxTile;
  if (tiles && bit(extended.edx, 22)) found |= kAmxBf16;
  return found;
}

#else

uint64_t detect() { return 0; }
bool request_amx() { return false; }

#endif

}  // namespace

// Which sources this library was built from: a number that setup.py computes of them (fastpeft/_sources.py).
// fastpeft/_native.py opens no library of other sources than its own.
FASTPEFT_EXPORT uint64_t fastpeft_cpu_sources() { return FASTPEFT_SOURCES; }

FASTPEFT_EXPORT uint64_t fastpeft_cpu_features() { return detect(); }

// Asks the kernel for the AMX tile registers, for this process and its later threads. Returns 1 if granted. Apart from
// the features because it is not free: every thread's signal frame grows by the 8 KB of the tiles.
FASTPEFT_EXPORT int32_t fastpeft_cpu_request_amx() { return request_amx() ? 1 : 0; }
