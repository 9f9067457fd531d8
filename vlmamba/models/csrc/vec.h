// Vectors of one machine register, and the few functions the kernels need on them.
//
// The width is that of the instruction set this file is compiled for: 64 bytes with AVX-512, 32
// with AVX2, 16 otherwise (SSE2, NEON). Arithmetic uses the vector types of GCC and Clang, so
// only exp has code of its own per instruction set. Multiply-adds contract to FMA where there is
// one.
#pragma once

#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Vectors in registers do not survive calls, so nothing in the loops may be one.
#define VLMAMBA_INLINE inline __attribute__((always_inline))

namespace vlmamba {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// Elements of type T that fill one register: Vec<float> has kLanes<float> of them.
template <typename T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

template <typename T, int Bytes = kVecBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename To, typename From>
VLMAMBA_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
VLMAMBA_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

// ---- memory: `count` is how many lanes exist, the others read 0 and are not written -------------

using Half16 = typename VecOf<uint16_t, kVecBytes / 2>::type;  // bfloat16 for one Vec<float>

VLMAMBA_INLINE Vec<float> widen(Half16 x) {
  return bits<Vec<float>>(__builtin_convertvector(x, Vec<uint32_t>) << 16);
}

VLMAMBA_INLINE Half16 narrow(Vec<float> x) {  // rounds to nearest even, keeps NaN
#if defined(__AVX512BF16__)
  return bits<Half16>(_mm512_cvtneps_pbh(x));
#else
  Vec<uint32_t> b = bits<Vec<uint32_t>>(x);
  b = x == x ? b + 0x7fff + ((b >> 16) & 1) : Vec<uint32_t>{} + 0x7fc00000u;
  return __builtin_convertvector(b >> 16, Half16);
#endif
}

template <typename V>
VLMAMBA_INLINE V copy_from(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

VLMAMBA_INLINE Vec<float> load_all(const float* p) { return copy_from<Vec<float>>(p); }
VLMAMBA_INLINE Vec<double> load_all(const double* p) { return copy_from<Vec<double>>(p); }
VLMAMBA_INLINE Vec<float> load_all(const c10::BFloat16* p) { return widen(copy_from<Half16>(p)); }

VLMAMBA_INLINE void store_all(float* p, Vec<float> x) { std::memcpy(p, &x, sizeof(x)); }
VLMAMBA_INLINE void store_all(double* p, Vec<double> x) { std::memcpy(p, &x, sizeof(x)); }
VLMAMBA_INLINE void store_all(c10::BFloat16* p, Vec<float> x) {
  const Half16 narrowed = narrow(x);
  std::memcpy(p, &narrowed, sizeof(narrowed));
}

template <typename T>
VLMAMBA_INLINE Vec<Wide<T>> load(const T* p, int count) {
  constexpr int lanes = kLanes<Wide<T>>;
  if (count == lanes) return load_all(p);
  T some[lanes] = {};
  for (int i = 0; i < count; ++i) some[i] = p[i];
  return load_all(some);
}

template <typename T>
VLMAMBA_INLINE void store(T* p, Vec<Wide<T>> x, int count) {
  constexpr int lanes = kLanes<Wide<T>>;
  if (count == lanes) return store_all(p, x);
  T some[lanes];
  store_all(some, x);
  for (int i = 0; i < count; ++i) p[i] = some[i];
}

// The sum of all lanes, by halves: a chain of additions would take as long as a short row.
template <typename T>
VLMAMBA_INLINE T sum(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(x);
  else return _mm512_reduce_add_pd(x);
#else
  for (int half = kLanes<T> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
#endif
}

// Brings the line at p to the second cache level: strides of Di elements use few sets of the first.
VLMAMBA_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- functions ----------------------------------------------------------------------------------

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// x within [low, high]; NaN stays NaN.
VLMAMBA_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));
#elif defined(__AVX2__)
  return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x));
#else
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
#endif
}

// 2^x = 2^n 2^f with n a multiple of 1 / kSteps and |f| <= 1 / (2 kSteps). Where a register can be
// searched by lane it holds the powers 2^(j / kSteps), and 2^f needs two terms less.
#if defined(__AVX512F__)
constexpr int kSteps = 16;
#else
constexpr int kSteps = 1;
#endif
// x + kRound is n + kRound: it has no bits below 1 / kSteps, and its lowest ones count such steps.
constexpr float kRound = 12582912.0f / kSteps;  // 1.5 * 2^23

// 2^(f + n), given n + kRound. The polynomials are the best ones through 2^0 = 1: their relative
// errors are below 2e-9 and 1e-7.
VLMAMBA_INLINE Vec<float> exp2_split(Vec<float> f, Vec<float> rounded) {
#if defined(__AVX512F__)
  constexpr Vec<float> powers = {
      1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
      1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
      1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  Vec<float> p = 0.05550214f * f + 0.24023429f;
  p = p * f + 0.69314718f;
  p = p * f + 1.0f;
  p *= static_cast<Vec<float>>(_mm512_permutexvar_ps(bits<__m512i>(rounded), powers));
  return _mm512_scalef_ps(p, rounded - kRound);  // by 2^floor(n)
#else
  Vec<float> p = 0.001326472731307149f * f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  // Adding n to the exponent field; n is kept where the field can hold it.
  return bits<Vec<float>>(bits<Vec<int32_t>>(p) + (bits<Vec<int32_t>>(rounded) << 23));
#endif
}

// 2^(a b), for |a b| < 1e15. Without AVX-512 the result is kept between 2^-126 and 2^127.
VLMAMBA_INLINE Vec<float> exp2_product(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  Vec<float> x = a * b;
  asm("" : "+v"(x));  // no FMAs of this product: the scan has more multiplications than additions
#else
  const Vec<float> x = clamp(a * b, -126.0f, 127.0f);
#endif
  const Vec<float> rounded = x + kRound;
  return exp2_split(x - (rounded - kRound), rounded);
}

VLMAMBA_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float high = static_cast<float>(kLog2e);
  constexpr float low = static_cast<float>(kLog2e - static_cast<double>(high));
  x = clamp(x, -87.0f, 88.0f);
  const Vec<float> rounded = x * high + kRound;
  return exp2_split((x * high - (rounded - kRound)) + x * low, rounded);
}

VLMAMBA_INLINE Vec<double> exp2_product(Vec<double> a, Vec<double> b) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp2(a[i] * b[i]);
  return y;
}

VLMAMBA_INLINE Vec<double> exp(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

template <typename V>
VLMAMBA_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// log(1 + t) for 0 <= t <= 1, as 2 atanh(s) with s = t / (2 + t) <= 1/3: accurate relative to the
// result also where t is tiny. The polynomial in s^2 is the best one, with an error below 5e-9.
VLMAMBA_INLINE Vec<float> log1p_unit(Vec<float> t) {
  const Vec<float> s = t / (2 + t), q = s * s;
  Vec<float> p = 0.14005993f * q + 0.14000903f;
  p = p * q + 0.20010764f;
  p = p * q + 0.33333208f;
  return 2 * s * (p * q + 1);
}

VLMAMBA_INLINE Vec<double> log1p_unit(Vec<double> t) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::log1p(t[i]);
  return y;
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
template <typename V>
VLMAMBA_INLINE V softplus(V x) {
  const V zero{};
  return (x > 0 ? x : zero) + log1p_unit(exp(x > 0 ? -x : x));
}

// The same, and its slope sigmoid(x), of one exp.
template <typename V>
VLMAMBA_INLINE V softplus(V x, V& slope) {
  const V zero{}, e = exp(x > 0 ? -x : x), share = 1 / (1 + e);
  slope = x > 0 ? share : e * share;
  return (x > 0 ? x : zero) + log1p_unit(e);
}

}  // namespace vlmamba
