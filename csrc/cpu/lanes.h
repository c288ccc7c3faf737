#pragma once
// Sixteen lanes of the accumulate type, written with the vector extension of GCC and Clang: one
// AVX-512 register of floats, two of AVX2, four of SSE or NEON.  Loops over arrays would leave it
// to the compiler whether eighteen weights stay in registers.
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/scalar.h"

// Lanes never cross a call that is not inlined, so what this warns of (passing them without
// AVX-512) does not happen.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mfd {

constexpr int kLanes = 16;

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;
template <typename A>
using Lanes = Vector<A, kLanes>;

template <typename A>
[[gnu::always_inline]] inline Lanes<A> broadcast(A value) {
  return Lanes<A>{} + value;
}

// N elements at p as a vector of A.
template <typename A, int N, typename T>
[[gnu::always_inline]] inline Vector<A, N> load_exactly(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    Vector<uint16_t, N> bits;
    std::memcpy(&bits, p, sizeof(bits));
    const auto high = __builtin_convertvector(bits, Vector<uint32_t, N>) << 16;
    return reinterpret_cast<Vector<A, N>>(high);
  } else {
    Vector<T, N> value;
    std::memcpy(&value, p, sizeof(value));
    return __builtin_convertvector(value, Vector<A, N>);
  }
}

// All lanes rounded to T, as bf16's and fp16's conversions round.
template <typename A, typename T>
[[gnu::always_inline]] inline void store_all(T* p, const Lanes<A>& value) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto u = reinterpret_cast<Vector<uint32_t, kLanes>>(value);
    const auto rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const auto quiet = (u >> 16) | 0x40u;
    const auto bits = value != value ? quiet : rounded;
    const auto narrow = __builtin_convertvector(bits, Vector<uint16_t, kLanes>);
    std::memcpy(p, &narrow, sizeof(narrow));
  } else {
    const auto narrow = __builtin_convertvector(value, Vector<T, kLanes>);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
}

// The first `count` (at most kLanes) elements at p; zeros behind them.  Half a vector is a case of
// its own (heads of width 8): put together in memory, it would wait for the stores of its pieces.
template <typename A, typename T>
[[gnu::always_inline]] inline Lanes<A> load_lanes(const T* p, int64_t count = kLanes) {
  if (count >= kLanes) return load_exactly<A, kLanes>(p);
  if (count == kLanes / 2) {
    const auto half = load_exactly<A, kLanes / 2>(p);
    return __builtin_shufflevector(half, decltype(half + half){}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                   11, 12, 13, 14, 15);
  }
  A wide[kLanes] = {};
  for (int i = 0; i < count; ++i) wide[i] = static_cast<A>(p[i]);
  return load_exactly<A, kLanes>(wide);
}

// Writes the first `count` lanes, rounded to T.
template <typename A, typename T>
[[gnu::always_inline]] inline void store_lanes(T* p, const Lanes<A>& value,
                                               int64_t count = kLanes) {
  if (count >= kLanes) return store_all<A>(p, value);
  T narrow[kLanes];
  store_all<A>(narrow, value);
  if (count == kLanes / 2) return static_cast<void>(std::memcpy(p, narrow, sizeof(narrow) / 2));
  for (int i = 0; i < count; ++i) p[i] = narrow[i];
}

[[gnu::always_inline]] inline Lanes<double> exp(const Lanes<double>& in) {
  Lanes<double> x = in;
  for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

// e^x to 1 ulp of float: x = n ln2 + r with |r| <= ln2 / 2, a Taylor polynomial of degree 7 in r
// (its remainder is 5e-9) and 2^n put together from bits.  0 below -87 and infinity above 88; NaN
// stays NaN.
[[gnu::always_inline]] inline Lanes<float> exp(const Lanes<float>& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the low bits
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  const Lanes<float> shifted = x * 1.44269504f + kRound;
  const Lanes<float> n = shifted - kRound;
  const Lanes<float> r = (x - n * kLn2High) - n * kLn2Low;
  Lanes<float> p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const auto bits = reinterpret_cast<Lanes<int32_t>>(shifted) - std::bit_cast<int32_t>(kRound);
  const Lanes<float> power = reinterpret_cast<Lanes<float>>((bits + 127) << 23);
  const Lanes<float> huge = broadcast(std::numeric_limits<float>::infinity());
  const Lanes<float> y = x < -87.0f ? Lanes<float>{} : p * power;
  return x > 88.0f ? huge : y;
}

template <typename A>
struct Silu {
  Lanes<A> sigmoid, value;
};

template <typename A>
[[gnu::always_inline]] inline Silu<A> silu(const Lanes<A>& x) {
  const Lanes<A> sigmoid = A{1} / (A{1} + exp(-x));
  return {sigmoid, x * sigmoid};
}

// The derivative of SiLU where it has this sigmoid and value: s + x s (1 - s).
template <typename A>
[[gnu::always_inline]] inline Lanes<A> slope(const Silu<A>& at) {
  return at.sigmoid + at.value * (A{1} - at.sigmoid);
}

}  // namespace mfd
