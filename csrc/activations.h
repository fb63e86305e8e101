// The activation functions, one struct each, for the CPU and for CUDA: value and slope in one place, since both are
// made of the same exp() (the compiler leaves out the one that a caller does not use).
//
// To add one: a struct like Silu, its line in for_activation() below, and its reference in megagpt/ops/activation.py.
#pragma once

#include "common.h"

#if defined(__CUDACC__) || defined(MEGAGPT_EMULATED_CUDA)  // the emulation runs what a GPU would
#define MEGAGPT_GPU_CODE
#include "common.cuh"
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

// exp(x) and 1 / x for the functions below: in CUDA the hardware's approximations, whose error of some 1e-6 is far below
// that of 16 bits; on the CPU a shorter polynomial, without the last denormals (0 below -87.7) and
// without NaN, which reaches every result below by a factor x of its own.
#ifdef MEGAGPT_GPU_CODE
MEGAGPT_HD float fast_exp(float x) { return __expf(x); }
MEGAGPT_HD float inverse(float x) { return __fdividef(1.0f, x); }
#else
template <typename I>
MEGAGPT_INLINE I bits_of(float x) {
  I bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
MEGAGPT_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
MEGAGPT_HD double fast_exp(double x) { return std::exp(x); }
MEGAGPT_HD float fast_exp(float x) {
  // -88 to 89: of floats' bits, compared as integers, positive ones are in order and negative ones in reverse.
  const uint32_t high = static_cast<uint32_t>(std::min(bits_of<int32_t>(x), bits_of<int32_t>(89.0f)));
  const float clamped = float_of(std::min(high, bits_of<uint32_t>(-88.0f)));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it ends in the nearest integer
  const float t = clamped * 1.44269504088896341f, shifted = t + kRound, r = t - (shifted - kRound);
  float p = 1.535336188e-4f;  // 2^r, |r| <= 1/2 (Cephes, exp2f.c)
  p = madd(p, r, 1.339887440e-3f);
  p = madd(p, r, 9.618437358e-3f);
  p = madd(p, r, 5.550332471e-2f);
  p = madd(p, r, 2.402264791e-1f);
  p = madd(p, r, 6.931472029e-1f);
  p = madd(p, r, 1.0f);
  return p * float_of((bits_of<uint32_t>(shifted) + 127) << 23);  // times 2^n: 0 for n = -127, infinity for 128
}
template <typename F>
MEGAGPT_HD F inverse(F x) {
  return 1 / x;
}
#endif

// 1 / (1 + exp(-x)).
template <typename F>
MEGAGPT_HD F sigmoid(F x) {
  return inverse(1 + fast_exp(-x));
}

// The normal distribution's cumulative function and its slope, the density; both to 1e-7 by one exp(-x^2 / 2)
// (Abramowitz & Stegun 1964, 7.1.26). float64 has the standard library's erf.
MEGAGPT_HD Point<float> normal(float x) {
  const float bell = fast_exp(-0.5f * x * x);
  const float t = inverse(1.0f + 0.3275911f * 0.707106781f * fabsf(x));
  float p = 0.5307027145f;  // half of theirs
  p = p * t - 0.726576013f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const float tail = p * t * bell;
  return {x < 0.0f ? tail : 1.0f - tail, 0.398942280f * bell};
}
#ifndef MEGAGPT_GPU_CODE
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
