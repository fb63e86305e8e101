// exp, tanh and erf without branches or calls, so that loops over them vectorise; float32 to about 1e-7 relative.
// The float64 versions are the standard library's: they exist for checks, not for speed.
#pragma once

#include "common.h"

namespace megagpt {

// One instruction where the instruction set has it (-ffp-contract=fast), never a call.
MEGAGPT_INLINE float madd(float a, float b, float c) { return a * b + c; }

MEGAGPT_INLINE double vexp(double x) { return std::exp(x); }
MEGAGPT_INLINE double vtanh(double x) { return std::tanh(x); }
MEGAGPT_INLINE double verf(double x) { return std::erf(x); }

// 2^n * p(r) with x = n ln 2 + r, |r| <= ln 2 / 2 (Cody & Waite 1980); 0 below -103.97, inf above 88.72, NaN for NaN.
MEGAGPT_INLINE float vexp(float x) {
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float n = std::nearbyint(clamped * 1.44269504088896341f);
  const float r = madd(n, 2.12194440e-4f, madd(n, -0.693359375f, clamped));
  float p = 1.9875691500e-4f;
  p = madd(p, r, 1.3981999507e-3f);
  p = madd(p, r, 8.3334519073e-3f);
  p = madd(p, r, 4.1665795894e-2f);
  p = madd(p, r, 1.6666665459e-1f);
  p = madd(p, r, 5.0000001201e-1f);
  p = madd(p * r, r, r + 1.0f);
  // 2^n in two factors: n reaches from -150 to 128, and one float's exponent does not.
  const int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
  const int32_t low_bits = (half + 127) << 23, high_bits = (whole - half + 127) << 23;
  float low, high;
  std::memcpy(&low, &low_bits, sizeof(low));
  std::memcpy(&high, &high_bits, sizeof(high));
  const float y = p * low * high;
  return x == x ? y : x;
}

// An odd polynomial near 0, where 1 - 2/(e^2x + 1) would cancel; the latter elsewhere (Cephes, tanhf.c).
MEGAGPT_INLINE float vtanh(float x) {
  const float a = std::fabs(x);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = madd(p, s, 2.06390887954e-2f);
  p = madd(p, s, -5.37397155531e-2f);
  p = madd(p, s, 1.33314422036e-1f);
  p = madd(p, s, -3.33332819422e-1f);
  const float near = madd(p * s, x, x);
  const float far = 1.0f - 2.0f / (vexp(2.0f * a) + 1.0f);
  return a < 0.625f ? near : std::copysign(far, x);
}

// x * p(x^2) near 0 (Cephes, ndtrf.c), 1 - erfc elsewhere.
MEGAGPT_INLINE float verf(float x) {
  const float a = std::fabs(x);
  const float s = x * x;
  float p = 7.853861353153693e-5f;
  p = madd(p, s, -8.010193625184903e-4f);
  p = madd(p, s, 5.188327685732524e-3f);
  p = madd(p, s, -2.685381193529856e-2f);
  p = madd(p, s, 1.128358514861418e-1f);
  p = madd(p, s, -3.761262582423300e-1f);
  p = madd(p, s, 1.128379165726710e+0f);
  const float near = p * x;
  // erfc(a) = t exp(-a^2 + q(t)), t = 1 / (1 + a/2) (Numerical Recipes, section 6.2): 1.2e-7 of erfc everywhere.
  const float t = 1.0f / madd(0.5f, a, 1.0f);
  float q = 0.17087277f;
  q = madd(q, t, -0.82215223f);
  q = madd(q, t, 1.48851587f);
  q = madd(q, t, -1.13520398f);
  q = madd(q, t, 0.27886807f);
  q = madd(q, t, -0.18628806f);
  q = madd(q, t, 0.09678418f);
  q = madd(q, t, 0.37409196f);
  q = madd(q, t, 1.00002368f);
  q = madd(q, t, -1.26551223f);
  const float far = 1.0f - t * vexp(madd(-a, a, q));
  return a < 1.0f ? near : std::copysign(far, x);
}

}  // namespace megagpt
