// csrc/cuda/device.h where the kernels run on a CPU: the operators take torch's tensors on the CPU, so that all of
// library.cpp runs too.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "emulator.h"

#define FASTPEFT_LIBRARY fastpeft_cuda_emulated
#define FASTPEFT_DISPATCH_KEY CPU

namespace fastpeft {

// Kernels may touch the tensors that torch allocated, which nobody announces, for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t) { emulator::anywhere = true; }
  ~DeviceGuard() { emulator::anywhere = false; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

inline bool is_on_device(const torch::stable::Tensor& t) { return t.is_cpu(); }
inline void* current_stream(int32_t) { return nullptr; }
inline int processors_of(int32_t) { return 4; }

}  // namespace fastpeft
