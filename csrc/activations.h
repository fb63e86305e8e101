// The activation functions, one struct each, for the CPU and for CUDA: value and slope in one place, since both are
// made of the same exp() (the compiler leaves out the one that a caller does not use).
//
// To add one: a struct like Silu, its line in for_activation() below, and its reference in megagpt/ops/activation.py.
#pragma once

#include "common.h"

#ifdef __CUDACC__
#define MEGAGPT_HD __device__ __forceinline__
#else
#include "vec_math.h"
#define MEGAGPT_HD MEGAGPT_INLINE
#endif

namespace megagpt {

// f(x) and f'(x).
template <typename F>
struct Point {
  F value, slope;
};

// 1 / (1 + exp(-x)). In CUDA by the two hardware approximations: their error, some 1e-6, is far below that of 16 bits.
#ifdef __CUDACC__
MEGAGPT_HD float fast_exp(float x) { return __expf(x); }
MEGAGPT_HD float inverse(float x) { return __fdividef(1.0f, x); }
#else
template <typename F>
MEGAGPT_HD F fast_exp(F x) {
  return vexp(x);
}
template <typename F>
MEGAGPT_HD F inverse(F x) {
  return 1 / x;
}
#endif

template <typename F>
MEGAGPT_HD F sigmoid(F x) {
  return inverse(1 + fast_exp(-x));
}

// The normal distribution's cumulative function and its slope, the density; both to 1e-7 by one exp(-x^2 / 2)
// (Abramowitz & Stegun 1964, 7.1.26). float64 has the standard library's erf.
MEGAGPT_HD Point<float> normal(float x) {
  const float bell = fast_exp(-0.5f * x * x);
  const float t = inverse(1.0f + 0.3275911f * 0.707106781f * fabsf(x));
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * bell;
  return {x < 0.0f ? tail : 1.0f - tail, 0.398942280f * bell};
}
#ifndef __CUDACC__
MEGAGPT_HD Point<double> normal(double x) {
  return {0.5 * (1 + std::erf(x * 0.70710678118654752)), 0.39894228040143268 * std::exp(-0.5 * x * x)};
}
#endif

struct Gelu {  // x Phi(x): Hendrycks & Gimpel 2016
  template <typename F>
  MEGAGPT_HD static Point<F> at(F x) {
    const Point<F> phi = normal(x);
    return {x * phi.value, phi.value + x * phi.slope};
  }
};

struct GeluTanh {  // x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  template <typename F>
  MEGAGPT_HD static Point<F> at(F x) {
    constexpr F a = 1.5957691216057308, b = 0.07135481627260025;  // 2u = x (a + b x^2)
    const F square = x * x > 1000 ? 1000 : x * x;                 // where sigmoid is 0 or 1: keeps 0 * inf away
    const F s = sigmoid(x * (a + b * square));
    return {x * s, s + x * s * (1 - s) * (a + 3 * b * square)};
  }
};

struct Relu {  // NaN stays NaN
  template <typename F>
  MEGAGPT_HD static Point<F> at(F x) {
    return {x <= 0 ? 0 : x, static_cast<F>(x <= 0 ? 0 : 1)};
  }
};

struct SquaredRelu {  // So et al. 2021, section 4
  template <typename F>
  MEGAGPT_HD static Point<F> at(F x) {
    const F r = x <= 0 ? 0 : x;
    return {r * r, 2 * r};
  }
};

struct Silu {  // x sigmoid(x): Hendrycks & Gimpel 2016
  template <typename F>
  MEGAGPT_HD static Point<F> at(F x) {
    const F s = sigmoid(x);
    return {x * s, s * (1 + x * (1 - s))};
  }
};

// Calls f with a value of the struct of that name: f([&](auto op) { using Op = decltype(op); ... }).
template <typename F>
void for_activation(const std::string& kind, F&& f) {
  if (kind == "gelu") return f(Gelu{});
  if (kind == "gelu_tanh") return f(GeluTanh{});
  if (kind == "relu") return f(Relu{});
  if (kind == "relu2") return f(SquaredRelu{});
  if (kind == "silu") return f(Silu{});
  STD_TORCH_CHECK(false, "activation: got kind=", kind, "; wanted gelu, gelu_tanh, relu, relu2 or silu");
}

}  // namespace megagpt
