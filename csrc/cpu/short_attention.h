#pragma once
// out = softmax(scale q k^T + bias) v within each (row, head), for at most kMaxTokens tokens.
// q, k, v [rows, tokens, heads, width] with free strides, bias [heads, tokens, tokens].
//
// The queries of a (row, head) are the sixteen lanes (q is transposed in the cache), so that the
// softmax over the keys has no sum across lanes.  Everything is read and written once, and the
// probabilities never leave the core; the backward recomputes them.
#include <algorithm>
#include <vector>

#include "cpu/lanes.h"

namespace mfd {

constexpr int kMaxTokens = kLanes;
constexpr int kMaxWidth = 64;

// [rows, tokens, heads, width] with a contiguous last dimension.
template <typename T>
struct TokenView {
  T* base;
  int64_t row, token, head;
  T* at(int64_t r, int64_t h) const { return base + r * row + h * head; }
};

template <typename A>
struct BiasView {
  const A* base;  // or null
  int64_t head, query, key;
};

template <typename T>
struct ShortAttentionParams {
  TokenView<const T> q, k, v;
  BiasView<accumulate_t<T>> bias;
  TokenView<T> out;         // forward
  TokenView<const T> grad;  // backward: the gradient at out
  TokenView<T> grad_q, grad_k, grad_v;
  double* grad_bias;  // backward: partial sums [tasks, heads, tokens, tokens]; null: not wanted
  int64_t rows, tokens, heads, width;
  accumulate_t<T> scale;
};

// Rows per task of the backward; fixed, so that the sums over rows do not depend on the threads.
constexpr int64_t kAttentionRows = 128;

template <typename T>
class ShortAttentionPair {
  using A = accumulate_t<T>;
  using V = Lanes<A>;

 public:
  explicit ShortAttentionPair(const ShortAttentionParams<T>& p)
      : p_(p),
        tokens_(static_cast<int>(p.tokens)),
        width_(static_cast<int>(p.width)),
        vectors_((width_ + kLanes - 1) / kLanes) {
    if (p.bias.base == nullptr) return;
    bias_.resize(p.heads * tokens_);
    for (int64_t row = 0; row < p.heads * tokens_; ++row)
      for (int i = 0; i < tokens_; ++i)
        bias_[row][i] =
            p.bias
                .base[row / tokens_ * p.bias.head + i * p.bias.query + row % tokens_ * p.bias.key];
  }

  void forward(int64_t row, int64_t head) {
    gather(p_.q, row, head, q_);
    gather(p_.k, row, head, k_);
    gather(p_.v, row, head, v_);
    transpose(q_, q_t_);
    probabilities(head);
    for (int i = 0; i < tokens_; ++i)
      for (int c = 0; c < vectors_; ++c) put(p_.out, row, head, i, c, combine_keys(p_t_, i, v_, c));
  }

  // Writes the three gradients and adds the one of the bias to `grad_bias` [tokens, tokens], if
  // any.
  void backward(int64_t row, int64_t head, double* grad_bias) {
    gather(p_.q, row, head, q_);
    gather(p_.k, row, head, k_);
    gather(p_.v, row, head, v_);
    gather(p_.grad, row, head, g_);
    transpose(q_, q_t_);
    transpose(g_, g_t_);
    probabilities(head);
    score_gradients();
    for (int i = 0; i < tokens_; ++i)
      for (int c = 0; c < vectors_; ++c) {
        put(p_.grad_q, row, head, i, c, p_.scale * combine_keys(ds_t_, i, k_, c));
        put(p_.grad_k, row, head, i, c, p_.scale * combine_queries(ds_t_, i, q_, c));
        put(p_.grad_v, row, head, i, c, combine_queries(p_t_, i, g_, c));
      }
    if (grad_bias == nullptr) return;
    for (int i = 0; i < tokens_; ++i)
      for (int j = 0; j < tokens_; ++j) grad_bias[i * tokens_ + j] += ds_t_[j][i];
  }

 private:
  using Rows = V[kMaxTokens][kMaxWidth / kLanes];  // [token][width]
  using Columns = V[kMaxWidth];                    // [width][token]
  using Square = V[kMaxTokens];                    // [key][query]

  int count(int c) const { return std::min(width_ - c * kLanes, kLanes); }

  void gather(const TokenView<const T>& view, int64_t row, int64_t head, Rows& to) const {
    const T* from = view.at(row, head);
    for (int i = 0; i < tokens_; ++i)
      for (int c = 0; c < vectors_; ++c)
        to[i][c] = load_lanes<A>(from + i * view.token + c * kLanes, count(c));
  }

  void put(const TokenView<T>& view, int64_t row, int64_t head, int i, int c, const V& x) const {
    store_lanes<A>(view.at(row, head) + i * view.token + c * kLanes, x, count(c));
  }

  void transpose(const Rows& from, Columns& to) const {
    A* out = reinterpret_cast<A*>(to);
    for (int i = 0; i < tokens_; ++i) {
      const A* in = reinterpret_cast<const A*>(from[i]);
      for (int d = 0; d < width_; ++d) out[d * kLanes + i] = in[d];
    }
  }

  // The products of every query (a column of x) with row j of y.
  [[gnu::always_inline]] V products(const Columns& x, const Rows& y, int j) const {
    const A* row = reinterpret_cast<const A*>(y[j]);
    V sum[4] = {};  // chains of dependent additions
    int d = 0;
    for (; d + 3 < width_; d += 4)
      for (int chain = 0; chain < 4; ++chain) sum[chain] += row[d + chain] * x[d + chain];
    for (; d < width_; ++d) sum[d % 4] += row[d] * x[d];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // The softmax over keys; the lanes past the last query hold something finite.
  void probabilities(int64_t head) {
    V top = broadcast(-std::numeric_limits<A>::infinity());
    for (int j = 0; j < tokens_; ++j) {
      p_t_[j] = p_.scale * products(q_t_, k_, j);
      if (!bias_.empty()) p_t_[j] += bias_[head * tokens_ + j];
      top = p_t_[j] > top ? p_t_[j] : top;
    }
    V total{};
    for (int j = 0; j < tokens_; ++j) {
      p_t_[j] = exp(p_t_[j] - top);
      total += p_t_[j];
    }
    const V inverse = A{1} / total;
    for (int j = 0; j < tokens_; ++j) p_t_[j] *= inverse;
  }

  void score_gradients() {
    V delta{};
    for (int j = 0; j < tokens_; ++j) {
      ds_t_[j] = products(g_t_, v_, j);
      delta += p_t_[j] * ds_t_[j];
    }
    for (int j = 0; j < tokens_; ++j) ds_t_[j] = p_t_[j] * (ds_t_[j] - delta);
  }

  // Vector c of sum_j weight[j, query] x[j].
  [[gnu::always_inline]] V combine_keys(const Square& weight, int query, const Rows& x,
                                        int c) const {
    const A* column = reinterpret_cast<const A*>(weight) + query;
    V sum{};
    for (int j = 0; j < tokens_; ++j) sum += column[j * kLanes] * x[j][c];
    return sum;
  }

  // Vector c of sum_i weight[key, i] x[i].
  [[gnu::always_inline]] V combine_queries(const Square& weight, int key, const Rows& x,
                                           int c) const {
    const A* row = reinterpret_cast<const A*>(weight + key);
    V sum{};
    for (int i = 0; i < tokens_; ++i) sum += row[i] * x[i][c];
    return sum;
  }

  const ShortAttentionParams<T>& p_;
  const int tokens_, width_, vectors_;
  Rows q_, k_, v_, g_;
  Columns q_t_ = {}, g_t_ = {};
  Square p_t_, ds_t_;
  std::vector<V> bias_;  // [head][key][query]
};

// Tasks [begin, end) of rows * heads.
template <typename T>
void short_attention_cpu(const ShortAttentionParams<T>& p, int64_t begin, int64_t end) {
  ShortAttentionPair<T> pair(p);
  for (int64_t task = begin; task < end; ++task) pair.forward(task / p.heads, task % p.heads);
}

// Tasks [begin, end) of kAttentionRows rows each.
template <typename T>
void short_attention_grad_cpu(const ShortAttentionParams<T>& p, int64_t begin, int64_t end) {
  ShortAttentionPair<T> pair(p);
  const int64_t square = p.tokens * p.tokens;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t last = std::min((task + 1) * kAttentionRows, p.rows);
    for (int64_t row = task * kAttentionRows; row < last; ++row)
      for (int64_t head = 0; head < p.heads; ++head)
        pair.backward(row, head,
                      p.grad_bias ? p.grad_bias + (task * p.heads + head) * square : nullptr);
  }
}

}  // namespace mfd
