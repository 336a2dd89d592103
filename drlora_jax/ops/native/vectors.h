// Vectors of float32 as wide as the processor's, and exp of them.
//
// They use the compiler's vector extension (of GCC and Clang), not one processor's intrinsics.

#pragma once

#include <cstdint>
#include <cstring>

namespace drlora {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }
inline IntVec load(const int32_t* from) {
  IntVec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline Vec all(float value) { return Vec{} + value; }

// The first `count` lanes, or all; zeros in the others.
inline Vec load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  float lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(float));
  return load(lanes);
}

inline void store_some(float* to, Vec value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

inline float sum(Vec value) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// exp to 2 units in the last place; arguments below -87 give about 1e-38, above 88 about 1e38.
inline Vec exp(Vec x) {
  const Vec high = all(88.3762626647949f), low = all(-87.3365478515625f);
  x = x > high ? high : x;
  x = x < low ? low : x;
  // x = n ln 2 + r; adding 1.5 * 2^23 rounds to the nearest whole number.
  const Vec magic = all(12582912.0f);
  Vec shifted = x * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec bits, exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4B400000) << 23;
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent;
  std::memcpy(&p, &bits, sizeof p);
  return x == x ? p : x;  // NaN stays NaN
}

}  // namespace drlora
