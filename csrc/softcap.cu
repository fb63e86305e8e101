// Soft cap, in CUDA: see megagpt/ops/softcap.py. The worked example of docs/adding-a-kernel.md.

#include "common.cuh"

namespace megagpt {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float value(float x, float cap) {
  return cap * tanhf(x / cap);  // formula
}

__device__ __forceinline__ float slope(float x, float cap) {
  const float t = tanhf(x / cap);  // formula
  return 1.0f - t * t;             // formula
}

// A pack of 16 bytes a thread.
template <typename T>
__global__ void softcap_packs(const T* __restrict__ x, T* __restrict__ y, int64_t n_packs, float cap) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n_packs) return;
  float v[kSize];
  load_pack(x + i * kSize, v);
#pragma unroll
  for (int k = 0; k < kSize; ++k) v[k] = value(v[k], cap);
  store_pack(y + i * kSize, v);
}

// The same, an element a thread: for what does not divide into packs.
template <typename T>
__global__ void softcap_elements(const T* __restrict__ x, T* __restrict__ y, int64_t n, float cap) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = from_float<T>(value(to_float(x[i]), cap));
}

template <typename T>
__global__ void softcap_backward_packs(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ dx,
                                       int64_t n_packs, float cap) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n_packs) return;
  float g[kSize], v[kSize];
  load_pack(grad + i * kSize, g);
  load_pack(x + i * kSize, v);
#pragma unroll
  for (int k = 0; k < kSize; ++k) g[k] *= slope(v[k], cap);
  store_pack(dx + i * kSize, g);
}

template <typename T>
__global__ void softcap_backward_elements(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ dx,
                                          int64_t n, float cap) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) dx[i] = from_float<T>(to_float(grad[i]) * slope(to_float(x[i]), cap));
}

Tensor softcap_cuda(const Tensor& x_in, double cap) {
  const Tensor x = dense(x_in);
  const Tensor y = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  for_cuda_dtype("softcap", x, [&](auto zero) {
    using T = decltype(zero);
    if (packable<T>(n, data<T>(x), data<T>(y))) {
      MEGAGPT_BRANCH("softcap.cuda.packs");
      const int64_t n_packs = n / Pack<T>::kSize;
      launch(softcap_packs<T>, dim3(ceil_div(n_packs, kThreads)), kThreads, 0, x, data<T>(x), mutable_data<T>(y),
             n_packs, cap);
    } else {
      MEGAGPT_BRANCH("softcap.cuda.elements");
      launch(softcap_elements<T>, dim3(ceil_div(n, kThreads)), kThreads, 0, x, data<T>(x), mutable_data<T>(y), n, cap);
    }
  });
  return y;
}

Tensor softcap_backward_cuda(const Tensor& grad_in, const Tensor& x_in, double cap) {
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const Tensor dx = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  for_cuda_dtype("softcap_backward", x, [&](auto zero) {
    using T = decltype(zero);
    if (packable<T>(n, data<T>(grad), data<T>(x), data<T>(dx))) {
      MEGAGPT_BRANCH("softcap_backward.cuda.packs");
      const int64_t n_packs = n / Pack<T>::kSize;
      launch(softcap_backward_packs<T>, dim3(ceil_div(n_packs, kThreads)), kThreads, 0, x, data<T>(grad), data<T>(x),
             mutable_data<T>(dx), n_packs, cap);
    } else {
      MEGAGPT_BRANCH("softcap_backward.cuda.elements");
      launch(softcap_backward_elements<T>, dim3(ceil_div(n, kThreads)), kThreads, 0, x, data<T>(grad), data<T>(x),
             mutable_data<T>(dx), n, cap);
    }
  });
  return dx;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CUDA_KERNELS(m) {
  m.impl("softcap", TORCH_BOX(&megagpt::softcap_cuda));
  m.impl("softcap_backward", TORCH_BOX(&megagpt::softcap_backward_cuda));
}
