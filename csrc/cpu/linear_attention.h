#pragma once
// Linear attention of SANA and its gradient, one (row, head) at a time.
//
//   state   = sum_t [v_t; 1] relu(k_t)^T                      [D + 1, D]
//   out_t   = (state[:D] q'_t) / n_t,   n_t = state[D] q'_t + eps,   q' = relu(q)
//
//   c_t     = g_t . out_t                                     g: gradient of out
//   dq'_t   = state^T [g_t; -c_t] / n_t
//   dstate  = sum_t [g_t; -c_t] (q'_t / n_t)^T                scaled on q': g / n overflows where
//   q' = 0 dk'_t   = dstate^T [v_t; 1],   dv_t = dstate[:D] k'_t
//
// Heads of a row are worked on in groups of kHeadGroup, token block by token block: the D elements
// of one head are far apart from token to token (26,880 bytes in SANA's fused q, k, v), so
// neighbouring heads share the pages that a block touches.  Each block is converted once into a
// cache-resident fp32 copy.
#include <vector>

#include "cpu/matmul_tile.h"

namespace mfd {

constexpr int64_t kTokenBlock = 64;
constexpr int64_t kHeadGroup = 8;

// [rows, tokens, heads, D] with the last dimension contiguous.
template <typename T>
struct HeadView {
  T* data;
  int64_t row, token, head;
  T* at(int64_t r, int64_t t, int64_t h) const { return data + r * row + t * token + h * head; }
};

template <typename T>
struct LinearAttentionParams {
  HeadView<const T> q, k, v;
  HeadView<T> out;
  accumulate_t<T>* state;  // [rows, heads, D + 1, D], zeroed by the caller
  int64_t tokens, heads;
  accumulate_t<T> eps;
};

template <typename T>
struct LinearAttentionGradParams {
  HeadView<const T> grad, q, k, v;
  HeadView<T> grad_q, grad_k, grad_v;
  const accumulate_t<T>* state;  // [rows, heads, D + 1, D]
  int64_t tokens, heads;
  accumulate_t<T> eps;
};

// x < 0 ? 0 : x and not max(x, 0), so that a NaN stays one.
template <typename A>
inline A relu(A x) {
  return x < A{0} ? A{0} : x;
}

template <int D, bool kRelu, typename T, typename A>
inline void load_block(const HeadView<const T>& x, int64_t r, int64_t t, int64_t h, int64_t count,
                       A* block, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const T* __restrict__ from = x.at(r, t + i, h);
    A* __restrict__ to = block + i * stride;
    for (int d = 0; d < D; ++d) {
      const A value = static_cast<A>(from[d]);
      to[d] = kRelu ? relu(value) : value;
    }
  }
}

template <int D, typename T, typename A>
inline void store_row(const A* __restrict__ from, T* __restrict__ to) {
  for (int d = 0; d < D; ++d) to[d] = static_cast<T>(from[d]);
}

// The gradient through relu, in place: zero where the output of relu is.  Apart from the conversion
// to T, because GCC 12.2 (-O3, AVX2 or AVX-512) loads with the mask of the wrong half in `to[d] =
// static_cast<bf16>(x[d] <= 0 ? 0 : grad[d])`, a conditional load among two element widths.
template <typename A>
inline void zero_where_not_positive(const A* __restrict__ x, A* __restrict__ grad, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] = x[i] <= A{0} ? A{0} : grad[i];
}

template <int D, typename A>
inline void transpose(const A* from, A* to) {
  for (int e = 0; e < D; ++e)
    for (int d = 0; d < D; ++d) to[d * D + e] = from[e * D + d];
}

// f(row, first head, last head) for the groups of a range of (row, head) pairs.
template <typename F>
inline void for_head_groups(int64_t begin, int64_t end, int64_t heads, const F& f) {
  while (begin < end) {
    const int64_t row = begin / heads, head = begin - row * heads;
    const int64_t count = std::min({end - begin, heads - head, kHeadGroup});
    f(row, head, head + count);
    begin += count;
  }
}

// f(first token, tokens in the block, head) over blocks, then heads.
template <typename F>
inline void for_blocks(int64_t tokens, int64_t first_head, int64_t last_head, const F& f) {
  for (int64_t t = 0; t < tokens; t += kTokenBlock)
    for (int64_t head = first_head; head < last_head; ++head)
      f(t, std::min(kTokenBlock, tokens - t), head);
}

template <int D, typename T>
void linear_attention_cpu(const LinearAttentionParams<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int64_t kState = (D + 1) * D, kWide = D + 1;
  std::vector<A> x(kTokenBlock * D), v(kTokenBlock * kWide, A{1}), y(kTokenBlock * D);
  std::vector<A> transposed(kHeadGroup * D * D);
  for_head_groups(begin, end, p.heads, [&](int64_t r, int64_t first, int64_t last) {
    A* const states = p.state + r * p.heads * kState;
    for_blocks(p.tokens, first, last, [&](int64_t t, int64_t count, int64_t h) {
      load_block<D, true>(p.k, r, t, h, count, x.data(), D);
      load_block<D, false>(p.v, r, t, h, count, v.data(), kWide);
      matmul<D>(v.data(), 1, kWide, x.data(), states + h * kState, kWide, count);
    });
    for (int64_t h = first; h < last; ++h)
      transpose<D>(states + h * kState, transposed.data() + (h - first) * D * D);
    for_blocks(p.tokens, first, last, [&](int64_t t, int64_t count, int64_t h) {
      load_block<D, true>(p.q, r, t, h, count, x.data(), D);
      std::fill(y.begin(), y.end(), A{0});
      matmul<D>(x.data(), D, 1, transposed.data() + (h - first) * D * D, y.data(), count, D);
      const A* const normaliser = states + h * kState + D * D;
      for (int64_t i = 0; i < count; ++i) {
        A* const row = y.data() + i * D;
        const A n = dot<D>(x.data() + i * D, normaliser) + p.eps;
        for (int d = 0; d < D; ++d) row[d] /= n;
        store_row<D>(row, p.out.at(r, t + i, h));
      }
    });
  });
}

// What one thread needs for a block of tokens of one head; `wide` rows have one column more than D.
template <int D, typename A>
struct GradScratch {
  std::vector<A> x = std::vector<A>(kTokenBlock * D);
  std::vector<A> wide = std::vector<A>(kTokenBlock * (D + 1));
  std::vector<A> y = std::vector<A>(kTokenBlock * D);
  std::vector<A> dx = std::vector<A>(kTokenBlock * D);
  std::vector<A> inverse = std::vector<A>(kTokenBlock);
  std::vector<A> dstate = std::vector<A>(kHeadGroup * (D + 1) * D);
  std::vector<A> transposed = std::vector<A>(kHeadGroup * D * D);
};

// One block of tokens of one head: writes grad_q, adds to dstate.
template <int D, typename T, typename A>
void linear_attention_grad_q(const LinearAttentionGradParams<T>& p, GradScratch<D, A>& s, int64_t r,
                             int64_t t, int64_t count, int64_t h, const A* state,
                             const A* transposed, A* dstate) {
  constexpr int64_t kWide = D + 1;
  A *const q = s.x.data(), *const g = s.wide.data(), *const y = s.y.data(), *const dq = s.dx.data();
  std::fill(s.y.begin(), s.y.end(), A{0});
  std::fill(s.dx.begin(), s.dx.end(), A{0});
  load_block<D, true>(p.q, r, t, h, count, q, D);
  load_block<D, false>(p.grad, r, t, h, count, g, kWide);
  matmul<D>(q, D, 1, transposed, y, count, D);
  for (int64_t i = 0; i < count; ++i) {
    s.inverse[i] = A{1} / (dot<D>(q + i * D, state + D * D) + p.eps);
    g[i * kWide + D] = -dot<D>(g + i * kWide, y + i * D) * s.inverse[i];
    for (int d = 0; d < D; ++d) q[i * D + d] *= s.inverse[i];
  }
  matmul<D>(g, kWide, 1, state, dq, count, kWide);
  matmul<D>(g, 1, kWide, q, dstate, kWide, count);
  for (int64_t i = 0; i < count; ++i)
    for (int d = 0; d < D; ++d) dq[i * D + d] *= s.inverse[i];
  zero_where_not_positive(q, dq, count * D);
  for (int64_t i = 0; i < count; ++i) store_row<D>(dq + i * D, p.grad_q.at(r, t + i, h));
}

// One block of tokens of one head: writes grad_k and grad_v.
template <int D, typename T, typename A>
void linear_attention_grad_kv(const LinearAttentionGradParams<T>& p, GradScratch<D, A>& s,
                              int64_t r, int64_t t, int64_t count, int64_t h, const A* dstate,
                              const A* transposed) {
  constexpr int64_t kWide = D + 1;
  A *const k = s.x.data(), *const v = s.wide.data(), *const dv = s.y.data(),
           *const dk = s.dx.data();
  std::fill(s.y.begin(), s.y.end(), A{0});
  std::fill(s.dx.begin(), s.dx.end(), A{0});
  load_block<D, true>(p.k, r, t, h, count, k, D);
  load_block<D, false>(p.v, r, t, h, count, v, kWide);
  for (int64_t i = 0; i < count; ++i) v[i * kWide + D] = A{1};
  matmul<D>(v, kWide, 1, dstate, dk, count, kWide);
  matmul<D>(k, D, 1, transposed, dv, count, D);
  zero_where_not_positive(k, dk, count * D);
  for (int64_t i = 0; i < count; ++i) {
    store_row<D>(dk + i * D, p.grad_k.at(r, t + i, h));
    store_row<D>(dv + i * D, p.grad_v.at(r, t + i, h));
  }
}

template <int D, typename T>
void linear_attention_grad_cpu(const LinearAttentionGradParams<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int64_t kState = (D + 1) * D;
  GradScratch<D, A> scratch;
  for_head_groups(begin, end, p.heads, [&](int64_t r, int64_t first, int64_t last) {
    const A* const states = p.state + r * p.heads * kState;
    const auto dstate = [&](int64_t h) { return scratch.dstate.data() + (h - first) * kState; };
    const auto flipped = [&](int64_t h) { return scratch.transposed.data() + (h - first) * D * D; };
    std::fill(scratch.dstate.begin(), scratch.dstate.end(), A{0});
    for (int64_t h = first; h < last; ++h) transpose<D>(states + h * kState, flipped(h));
    for_blocks(p.tokens, first, last, [&](int64_t t, int64_t count, int64_t h) {
      linear_attention_grad_q(p, scratch, r, t, count, h, states + h * kState, flipped(h),
                              dstate(h));
    });
    for (int64_t h = first; h < last; ++h) transpose<D>(dstate(h), flipped(h));
    for_blocks(p.tokens, first, last, [&](int64_t t, int64_t count, int64_t h) {
      linear_attention_grad_kv(p, scratch, r, t, count, h, dstate(h), flipped(h));
    });
  });
}

}  // namespace mfd
