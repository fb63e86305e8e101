// exp and tanh without branches or calls, so that loops over them vectorise; float32 to about 1e-7 relative.
// The float64 versions are the standard library's: they exist for checks, not for speed.
#pragma once

#include "common.h"

namespace megagpt {

// One instruction where the instruction set has it (-ffp-contract=fast), never a call.
MEGAGPT_INLINE float madd(float a, float b, float c) { return a * b + c; }

MEGAGPT_INLINE double exp_below_zero(double x) { return std::exp(x); }
MEGAGPT_INLINE double vtanh(double x) { return std::tanh(x); }

// exp(x) for x <= 0; 0 below -87, NaN for NaN. 2^n p(r) with x = n ln 2 + r, |r| <= ln 2 / 2 (Cody & Waite 1980).
MEGAGPT_INLINE float exp_below_zero(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to a whole number, in its low bits
  const float shifted = madd(x, 1.44269504088896341f, kRound), n = shifted - kRound;
  const float r = madd(n, 2.12194440e-4f, madd(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = madd(p, r, 1.3981999507e-3f);
  p = madd(p, r, 8.3334519073e-3f);
  p = madd(p, r, 4.1665795894e-2f);
  p = madd(p, r, 1.6666665459e-1f);
  p = madd(p, r, 5.0000001201e-1f);
  p = madd(p * r, r, r + 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

// An odd polynomial near 0, where 1 - e^-2x would cancel; (1 - e^-2x) / (1 + e^-2x) elsewhere (Cephes, tanhf.c).
MEGAGPT_INLINE float vtanh(float x) {
  const float a = std::fabs(x);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = madd(p, s, 2.06390887954e-2f);
  p = madd(p, s, -5.37397155531e-2f);
  p = madd(p, s, 1.33314422036e-1f);
  p = madd(p, s, -3.33332819422e-1f);
  const float near = madd(p * s, x, x);
  const float e = exp_below_zero(-2.0f * a);
  const float far = (1.0f - e) / (1.0f + e);
  return a < 0.625f ? near : std::copysign(far, x);
}

}  // namespace megagpt
