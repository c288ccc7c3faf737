#pragma once
// a = SiLU(x + in_bias);  z = depthwise 3x3 of a (zero padding) + bias;  out = z[:C] * SiLU(z[C:])
// x [rows, height * width, 2C], out [rows, height * width, C], weight [2C, 3, 3].
//
// One task is kTileLanes channels of both halves of one sample.  It walks down the image with three
// rows of a in a buffer (the backward also with three rows of the gradient at z), so that every
// element of x is read once.  Traffic: read 2C, write C per token; backward read 3C, write 2C.
#include <algorithm>
#include <vector>

#include "cpu/lanes.h"

namespace mfd {

// 1 KiB of a float pixel at a time: four times less leaves the pages of x (2C floats apart) cold in
// the TLB, and the three rows still fit the L2.  SANA, 2 cores of an AMD EPYC: 17 ms, with 4
// vectors 24 ms.
constexpr int64_t kTileVectors = 16;
constexpr int64_t kTileLanes = kTileVectors * kLanes;

template <typename T>
struct GluDepthwiseParams {
  const T* x;
  const T* weight;
  const T* bias;
  const T* in_bias;  // or null
  T* out;            // forward
  const T* grad;     // backward: [rows, tokens, C]
  T* grad_x;         // backward: like x
  T* grad_conv;      // backward: the gradient at z, like x; null: not wanted
  int64_t height, width, channels;
};

inline int64_t glu_tiles(int64_t channels) { return (channels + kTileLanes - 1) / kTileLanes; }

// Three image rows of kTileLanes channels of both halves, one zero column on either side.
template <typename A>
class RowRing {
 public:
  explicit RowRing(int64_t width) : width_(width), data_(4 * row_size() + kLanes, A{0}) {
    const auto address = reinterpret_cast<uintptr_t>(data_.data());
    const auto bytes = sizeof(Lanes<A>);
    base_ = reinterpret_cast<Lanes<A>*>((address + bytes - 1) / bytes * bytes);
  }
  // Pixels -1..width of row y of one vector of channels; a row outside [0, height) is zero.
  Lanes<A>* pixels(int64_t y, int64_t height, int half, int64_t vector) {
    const int64_t slot = y < 0 || y >= height ? 3 : y % 3;
    return base_ + ((slot * 2 + half) * kTileVectors + vector) * (width_ + 2) + 1;
  }

 private:
  int64_t row_size() const { return 2 * kTileVectors * (width_ + 2) * kLanes; }
  int64_t width_;
  std::vector<A> data_;
  Lanes<A>* base_;
};

template <typename T>
class GluDepthwiseTile {
  using A = accumulate_t<T>;
  using V = Lanes<A>;

 public:
  GluDepthwiseTile(const GluDepthwiseParams<T>& p, bool backward)
      : p_(p), a_(p.width), slope_(backward ? p.width : 0), dz_(backward ? p.width : 0) {}

  void forward(int64_t row, int64_t tile) {
    start(row, tile);
    activate<false>(0);
    for (int64_t y = 0; y < p_.height; ++y) {
      if (y + 1 < p_.height) activate<false>(y + 1);
      for (int64_t vector = 0; vector < vectors_; ++vector) output(y, vector);
    }
  }

  void backward(int64_t row, int64_t tile) {
    start(row, tile);
    for (int64_t y = 0; y < p_.height + 2; ++y) {
      if (y < p_.height) activate<true>(y);
      for (int64_t vector = 0; vector < vectors_; ++vector) {
        if (y >= 1 && y <= p_.height) gate_gradient(y - 1, vector);
        if (y >= 2) input_gradient(y - 2, vector);
      }
    }
  }

 private:
  struct Taps {
    V w[3][3];
    V bias;
  };

  void start(int64_t row, int64_t tile) {
    row_ = row;
    first_ = tile * kTileLanes;
    vectors_ = (std::min(p_.channels - first_, kTileLanes) + kLanes - 1) / kLanes;
    for (int half = 0; half < 2; ++half)
      for (int64_t vector = 0; vector < vectors_; ++vector) {
        const int64_t channel = half * p_.channels + first_ + vector * kLanes;
        const int64_t count = lanes(vector);
        Taps& taps = taps_[half][vector];
        in_bias_[half][vector] =
            p_.in_bias ? load_lanes<A>(p_.in_bias + channel, count) : broadcast(A{0});
        taps.bias = load_lanes<A>(p_.bias + channel, count);
        for (int tap = 0; tap < 9; ++tap) {
          taps.w[tap / 3][tap % 3] = V{};
          for (int64_t i = 0; i < count; ++i)
            taps.w[tap / 3][tap % 3][i] = static_cast<A>(p_.weight[(channel + i) * 9 + tap]);
        }
      }
  }

  // Channels of the vector that exist (the last tile may be ragged).
  int64_t lanes(int64_t vector) const {
    return std::min<int64_t>(p_.channels - first_ - vector * kLanes, kLanes);
  }
  // Offset of a pixel's channels in x and what has its shape.
  int64_t at(int64_t y, int64_t column, int half, int64_t vector) const {
    const int64_t token = (row_ * p_.height + y) * p_.width + column;
    return (token * 2 + half) * p_.channels + first_ + vector * kLanes;
  }
  int64_t at_out(int64_t y, int64_t column, int64_t vector) const {
    const int64_t token = (row_ * p_.height + y) * p_.width + column;
    return token * p_.channels + first_ + vector * kLanes;
  }

  template <bool kSlope>
  void activate(int64_t y) {
    for (int64_t column = 0; column < p_.width; ++column)
      for (int half = 0; half < 2; ++half)
        for (int64_t vector = 0; vector < vectors_; ++vector) {
          const V x = load_lanes<A>(p_.x + at(y, column, half, vector), lanes(vector));
          const Silu<A> s = silu<A>(x + in_bias_[half][vector]);
          a_.pixels(y, p_.height, half, vector)[column] = s.value;
          if constexpr (kSlope) slope_.pixels(y, p_.height, half, vector)[column] = slope(s);
        }
  }

  // The three rows around y.
  struct Rows {
    const V* row[3];
  };
  Rows around(RowRing<A>& ring, int64_t y, int half, int64_t vector) {
    Rows rows;
    for (int i = 0; i < 3; ++i) rows.row[i] = ring.pixels(y + i - 1, p_.height, half, vector);
    return rows;
  }

  [[gnu::always_inline]] static V convolve(const Taps& taps, const Rows& rows, int64_t column) {
    V sum = taps.bias;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) sum += taps.w[i][j] * rows.row[i][column + j - 1];
    return sum;
  }

  [[gnu::always_inline]] static V convolve_transposed(const Taps& taps, const Rows& rows,
                                                      int64_t column) {
    V sum{};
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) sum += taps.w[2 - i][2 - j] * rows.row[i][column + j - 1];
    return sum;
  }

  void output(int64_t y, int64_t vector) {
    const Taps taps0 = taps_[0][vector], taps1 = taps_[1][vector];
    const Rows rows0 = around(a_, y, 0, vector), rows1 = around(a_, y, 1, vector);
    const int64_t count = lanes(vector);
    for (int64_t column = 0; column < p_.width; ++column) {
      const V gate = silu<A>(convolve(taps1, rows1, column)).value;
      store_lanes<A>(p_.out + at_out(y, column, vector), convolve(taps0, rows0, column) * gate,
                     count);
    }
  }

  void gate_gradient(int64_t y, int64_t vector) {
    const Taps taps0 = taps_[0][vector], taps1 = taps_[1][vector];
    const Rows rows0 = around(a_, y, 0, vector), rows1 = around(a_, y, 1, vector);
    V* dz0 = dz_.pixels(y, p_.height, 0, vector);
    V* dz1 = dz_.pixels(y, p_.height, 1, vector);
    const int64_t count = lanes(vector);
    for (int64_t column = 0; column < p_.width; ++column) {
      const V grad = load_lanes<A>(p_.grad + at_out(y, column, vector), count);
      const Silu<A> gate = silu<A>(convolve(taps1, rows1, column));
      dz0[column] = grad * gate.value;
      dz1[column] = grad * convolve(taps0, rows0, column) * slope(gate);
      if (p_.grad_conv == nullptr) continue;
      store_lanes<A>(p_.grad_conv + at(y, column, 0, vector), dz0[column], count);
      store_lanes<A>(p_.grad_conv + at(y, column, 1, vector), dz1[column], count);
    }
  }

  void input_gradient(int64_t y, int64_t vector) {
    for (int half = 0; half < 2; ++half) {
      const Taps taps = taps_[half][vector];
      const Rows rows = around(dz_, y, half, vector);
      const V* slopes = slope_.pixels(y, p_.height, half, vector);
      const int64_t count = lanes(vector);
      for (int64_t column = 0; column < p_.width; ++column)
        store_lanes<A>(p_.grad_x + at(y, column, half, vector),
                       convolve_transposed(taps, rows, column) * slopes[column], count);
    }
  }

  const GluDepthwiseParams<T>& p_;
  RowRing<A> a_, slope_, dz_;
  Taps taps_[2][kTileVectors];
  V in_bias_[2][kTileVectors];
  int64_t row_ = 0, first_ = 0, vectors_ = 0;
};

// Tasks [begin, end) of rows * glu_tiles(channels); the backward if `p.grad` is set.
template <typename T>
void glu_depthwise_cpu(const GluDepthwiseParams<T>& p, int64_t begin, int64_t end) {
  const bool backward = p.grad != nullptr;
  GluDepthwiseTile<T> worker(p, backward);
  const int64_t tiles = glu_tiles(p.channels);
  for (int64_t task = begin; task < end; ++task) {
    if (backward)
      worker.backward(task / tiles, task % tiles);
    else
      worker.forward(task / tiles, task % tiles);
  }
}

}  // namespace mfd
