// The device as library.cpp needs it: which one is present, torch's stream on it, how many processors it has.
//
// tests/cuda/emulated_device.h takes this file's place where the kernels run on a CPU.

#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// Name of the operators' library, and whose tensors they take.
#define FASTPEFT_LIBRARY fastpeft_cuda
#define FASTPEFT_DISPATCH_KEY CUDA

namespace fastpeft {

// Makes a device torch's present one for as long as this lives. The runtime that is linked in here sees it too: both
// ask the driver, which keeps one present context a thread.
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline bool is_on_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

// torch's current stream of a device. Only torch's CUDA library has the function that gives it, so it is looked up when
// first needed: the operators can be loaded, and have their schemas, under a torch without CUDA too.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "fastpeft_cuda: torch has no CUDA library with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == AOTI_TORCH_SUCCESS, "fastpeft_cuda: torch gave no current stream of device ",
                  device);
  return stream;
}

inline int processors_of(int32_t device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, "fastpeft_cuda: cudaDeviceGetAttribute failed: ", cudaGetErrorString(error));
  return count;
}

}  // namespace fastpeft
