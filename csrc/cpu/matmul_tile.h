#pragma once
// C[M, N] += A[M, K] B[K, N] where all three live in the cache: M is a handful of rows, N a head
// width.
//
// A is read element by element through two strides (so its transpose costs nothing), B and C by
// rows. The sum over K starts at zero and is added to C once: blocked summation, whose rounding
// error grows with the block length and not with the number of tokens.
#include <algorithm>

#include "cpu/scalar.h"

namespace mfd {

// Rows x two vectors of running sums must fit in the register file: 9 x 2 of 32 with AVX-512 (the
// tallest tile has one row more than kTileRows), 5 x 2 of 16 otherwise.
#ifdef __AVX512F__
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;
#else
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 4;
#endif

// Pairwise sum of x[i] * y[i] over N (a power of two) elements.
template <int N, typename A>
inline A dot(const A* x, const A* y) {
  constexpr int kLanes = std::min<int>(N, kVectorBytes / sizeof(A));
  A sum[kLanes] = {};
  for (int i = 0; i < N; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += x[i + lane] * y[i + lane];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
  return sum[0];
}

template <int M, int N, typename A>
inline void matmul_tile(const A* a, int64_t a_row, int64_t a_column, const A* b, A* c, int64_t k) {
  constexpr int kLanes = std::min<int>(N, kVectorBytes / sizeof(A));
  constexpr int kVectors = std::min(N / kLanes, 2);
  typedef A Vector __attribute__((vector_size(kLanes * sizeof(A)), aligned(alignof(A)), may_alias));
  for (int column = 0; column < N; column += kLanes * kVectors) {
    Vector sum[M][kVectors] = {};
    for (int64_t i = 0; i < k; ++i) {
      const Vector* b_row = reinterpret_cast<const Vector*>(b + i * N + column);
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kVectors; ++v) sum[m][v] += a[m * a_row + i * a_column] * b_row[v];
    }
    for (int m = 0; m < M; ++m) {
      Vector* c_row = reinterpret_cast<Vector*>(c + m * N + column);
      for (int v = 0; v < kVectors; ++v) c_row[v] += sum[m][v];
    }
  }
}

// c[rows, N] += a b for any number of rows; the last tile takes up to kTileRows + 1 of them, which
// suits the D + 1 rows of an attention state.
template <int N, typename A>
inline void matmul(const A* a, int64_t a_row, int64_t a_column, const A* b, A* c, int64_t rows,
                   int64_t k) {
  int64_t m = 0;
  const auto tile = [&](auto height) {
    matmul_tile<height(), N>(a + m * a_row, a_row, a_column, b, c + m * N, k);
    m += height();
  };
  while (rows - m >= kTileRows + 2 || rows - m == kTileRows)
    tile(std::integral_constant<int, kTileRows>{});
  if (rows - m == kTileRows + 1) tile(std::integral_constant<int, kTileRows + 1>{});
  while (m < rows) tile(std::integral_constant<int, 1>{});
}

}  // namespace mfd
