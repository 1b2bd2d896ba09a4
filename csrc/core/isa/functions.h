// Elementary functions on vectors (simd.h): exp, sigmoid, tanh. In fp32 by polynomials, exp within 1.5 ulp, the others
// within 3 where their results are not tiny; in fp64 lane by lane through libm.
#pragma once
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {

// The polynomial part of exp: e^r - 1 for |r| <= ln2/2, r = x - n ln2.
static inline vf32 expm1_reduced(vf32 x, vf32 n) {
  vf32 r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r;
}

// exp by Cody-Waite reduction and a degree-6 polynomial, times 2^n; results down to the smallest denormal and up to
// infinity come out right. NaN stays NaN.
static inline vf32 exp(vf32 x) {
  x = -max(splat(-89.0f), -max(splat(-104.0f), x));
#if defined(__AVX512F__)
  const vf32 n = reinterpret_cast<vf32>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x * 1.44269504088896341f), 8));
  return reinterpret_cast<vf32>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(expm1_reduced(x, n) + 1.0f), reinterpret_cast<__m512>(n)));
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf32 shifted = x * 1.44269504088896341f + magic;
  const vf32 p = expm1_reduced(x, shifted - magic) + 1.0f;
  // In two factors: 2^n alone may be no normal number.
  const vi32 k = bits_as<vi32>(shifted) - 0x4b400000;
  const vi32 half = k >> 1;
  return p * bits_as<vf32>((half + 127) << 23) * bits_as<vf32>((k - half + 127) << 23);
#endif
}

// exp of x <= 0, within 2 ulp, in two thirds of the instructions: log 2 in fp32 is so close that one fused subtraction
// reduces, a polynomial of degree 5 suffices (relative error 9e-8), and nothing overflows. Without AVX-512 results
// below the normal numbers are 0. NaN stays NaN.
static inline vf32 exp_negative(vf32 x) {
#if defined(__AVX2__) || defined(__AVX512F__)
  const float log2 = 0.69314718f;
#if defined(__AVX512F__)
  x = max(splat(-104.0f), x);
  const vf32 n = reinterpret_cast<vf32>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x * 1.44269504f), 8));
#else
  x = max(splat(-88.0f), x);
  const float magic = 12582912.0f;
  const vf32 shifted = x * 1.44269504f + magic, n = shifted - magic;
#endif
  const vf32 r = x - n * log2;
  vf32 p = splat(8.290272206e-3f);
  p = p * r + 4.189816117e-2f;
  p = p * r + 1.666763872e-1f;
  p = p * r + 4.999914765e-1f;
  p = p * r + 9.999997020e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<vf32>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // The exponent 2^n is where magic left it; n = -127 becomes 0.
  return p * bits_as<vf32>((bits_as<vu32>(shifted) << 23) + 0x3f800000u);
#endif
#else
  return exp(x);
#endif
}

static inline vf64 exp(vf64 x) {
  vf64 y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = ::exp(x[i]);
  return y;
}

static inline vf64 exp_negative(vf64 x) { return exp(x); }

// 1 / x for x of order 1, within 1 ulp. The division of 16 floats occupies the unit for as long as ten instructions.
static inline vf32 reciprocal(vf32 x) {
#if defined(__AVX512F__)
  const vf32 y = reinterpret_cast<vf32>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return y + y * (1 - x * y);
#else
  return 1 / x;
#endif
}

static inline vf32 with_sign(vf32 magnitude, vf32 x) {
  return bits_as<vf32>(bits_as<vu32>(magnitude) | (bits_as<vu32>(x) & 0x80000000u));
}
static inline vf32 negative(vf32 x) { return bits_as<vf32>(bits_as<vu32>(x) | 0x80000000u); }

// Of -|x|, which never overflows, and of |x| from it.
static inline vf32 sigmoid(vf32 x) {
  const vf32 e = exp_negative(negative(x));
  const vf32 y = reciprocal(1 + e);
  return x < 0 ? e * y : y;
}
static inline vf64 sigmoid(vf64 x) { return 1 / (1 + exp(-x)); }

// e^x - 1 for x <= 0, with relative accuracy: 2^n (e^r - 1) + (2^n - 1).
static inline vf32 expm1_negative(vf32 x) {
#if defined(__AVX512F__)
  x = max(splat(-104.0f), x);
  const vf32 n = reinterpret_cast<vf32>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x * 1.44269504f), 8));
  const vf32 scale = reinterpret_cast<vf32>(_mm512_scalef_ps(_mm512_set1_ps(1.0f), reinterpret_cast<__m512>(n)));
#else
  x = max(splat(-87.0f), x);
  const float magic = 12582912.0f;
  const vf32 shifted = x * 1.44269504f + magic, n = shifted - magic;
  const vf32 scale = bits_as<vf32>((bits_as<vu32>(shifted) << 23) + 0x3f800000u);
#endif
  return scale * expm1_reduced(x, n) + (scale - 1);
}

// -u / (2 + u), u = e^(-2|x|) - 1, with the sign of x, that of -0 too. Rounded as a division would be: near 1 gradients
// hang on the last bits.
static inline vf32 tanh(vf32 x) {
  const vf32 u = expm1_negative(negative(x) * 2), y = reciprocal(2 + u), q = -u * y;
  return with_sign(q - y * ((u + 2 * q) + q * u), x);
}

static inline vf64 tanh(vf64 x) {
  vf64 y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = ::tanh(x[i]);
  return y;
}

}  // namespace llmkern::cpu::LLMKERN_ISA
