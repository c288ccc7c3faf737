#pragma once
// Element types of the CPU kernels.  Arithmetic is done in accumulate_t<T>: float for everything
// but double.  Torch-free: bf16 and fp16 are 16 stored bits with the conversions the kernels need.
#include <bit>
#include <cstdint>
#include <type_traits>

namespace mfd {

struct bf16 {
  uint16_t bits;
  bf16() = default;
  // Round to nearest even; a NaN stays a (quiet) NaN.  Branch-free, so that loops vectorise.
  explicit bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value != value ? ((u >> 16) | 0x40u) : rounded);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

using fp16 = _Float16;

template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A flat range [begin, end) of a [rows, n] array, cut at row ends: f(row, first column, end
// column).
template <typename F>
inline void for_row_segments(int64_t begin, int64_t end, int64_t n, const F& f) {
  while (begin < end) {
    const int64_t row = begin / n;
    const int64_t lo = begin - row * n;
    const int64_t hi = end - row * n < n ? end - row * n : n;
    f(row, lo, hi);
    begin = row * n + hi;
  }
}

// Elements per parallel task of a streaming kernel: small enough for two cores to share a latent,
// large enough that a task is not all overhead.
constexpr int64_t kGrain = 16384;

}  // namespace mfd
