// Soft cap, on the CPU: see megagpt/ops/softcap.py. The worked example of docs/adding-a-kernel.md.

#include "common.h"
#include "vec_math.h"

namespace megagpt {
namespace {

template <typename A>
MEGAGPT_INLINE A value(A x, A cap) {
  return cap * vtanh(x / cap);  // formula
}

template <typename A>
MEGAGPT_INLINE A slope(A x, A cap) {
  const A t = vtanh(x / cap);  // formula
  return 1 - t * t;            // formula
}

template <typename T>
MEGAGPT_CLONES void forward(const T* __restrict x, T* __restrict y, int64_t n, acc_t<T> cap) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(value(load(x[i]), cap));
}

template <typename T>
MEGAGPT_CLONES void backward(const T* __restrict grad, const T* __restrict x, T* __restrict dx, int64_t n,
                             acc_t<T> cap) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dx[i] = store<T>(load(grad[i]) * slope(load(x[i]), cap));
}

Tensor softcap_cpu(const Tensor& x_in, double cap) {
  const Tensor x = dense(x_in);
  const Tensor y = torch::stable::empty_like(x);
  for_dtype("softcap", x, [&](auto zero) {
    using T = decltype(zero);
    MEGAGPT_BRANCH("softcap.cpu");
    parallel(x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      forward(data<T>(x) + begin, mutable_data<T>(y) + begin, end - begin, static_cast<acc_t<T>>(cap));
    });
  });
  return y;
}

Tensor softcap_backward_cpu(const Tensor& grad_in, const Tensor& x_in, double cap) {
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const Tensor dx = torch::stable::empty_like(x);
  for_dtype("softcap_backward", x, [&](auto zero) {
    using T = decltype(zero);
    parallel(x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      backward(data<T>(grad) + begin, data<T>(x) + begin, mutable_data<T>(dx) + begin, end - begin,
               static_cast<acc_t<T>>(cap));
    });
  });
  return dx;
}

}  // namespace
}  // namespace megagpt

MEGAGPT_CPU_KERNELS(m) {
  m.impl("softcap", TORCH_BOX(&megagpt::softcap_cpu));
  m.impl("softcap_backward", TORCH_BOX(&megagpt::softcap_backward_cpu));
}
