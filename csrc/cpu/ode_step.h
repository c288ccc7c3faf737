#pragma once
// One step of a linear multistep solver for every trajectory of every sample, guidance included.
//
//   v_s   = v_uncond + w (v_cond - v_uncond)   for the guided trajectory s = 0, else its own lane
//   x'_s  = a x_s + b v_s + c h_s              coefficients (a, b, c, p, q) per sample
//   h'_s  = p x_s + q v_s                      what the solver remembers (optional)
//   input = x'_s in the model's dtype, written to every lane of that trajectory (optional)
//
// x, h [batch, trajectories, n]; v, input [batch, lanes, n]; lanes = trajectories (+ 1 if guided:
// lane 0 conditional, lane 1 unconditional).  Traffic per trajectory and element: x read and
// written, its lanes read (and inputs written); h read and written only when it is there.
#include "cpu/scalar.h"

namespace mfd {

template <typename X, typename V>
struct OdeStepParams {
  X* x;
  const V* v;
  X* history;     // null: single-step solver
  const X* coef;  // [batch, 5]
  V* input;       // null: the model reads x itself
  X guidance;
  bool guided;
  int64_t trajectories, lanes, n;
};

template <typename X, typename V>
void ode_step_cpu(const OdeStepParams<X, V>& p, int64_t begin, int64_t end) {
  for_row_segments(begin, end, p.n, [&](int64_t row, int64_t lo, int64_t hi) {
    const int64_t sample = row / p.trajectories;
    const int64_t s = row - sample * p.trajectories;
    const bool combine = p.guided && s == 0;
    const int64_t lane = sample * p.lanes + s + (p.guided && s > 0 ? 1 : 0);
    const X* k = p.coef + 5 * sample;
    const X a = k[0], b = k[1], c = k[2], keep_x = k[3], keep_v = k[4], w = p.guidance;
    X* __restrict__ x = p.x + row * p.n;
    X* __restrict__ h = p.history ? p.history + row * p.n : nullptr;
    const V* __restrict__ v = p.v + lane * p.n;
    const V* __restrict__ v_uncond = v + p.n;  // read only when combining
    V* __restrict__ in = p.input ? p.input + lane * p.n : nullptr;

    const auto velocity = [&](int64_t i) {
      const X cond = static_cast<X>(v[i]);
      if (!combine) return cond;
      const X uncond = static_cast<X>(v_uncond[i]);
      return uncond + w * (cond - uncond);
    };
    for (int64_t i = lo; i < hi; ++i) {
      const X x_i = x[i], v_i = velocity(i);
      X next = a * x_i + b * v_i;
      if (h) {
        next += c * h[i];
        h[i] = keep_x * x_i + keep_v * v_i;
      }
      x[i] = next;
      if (in) in[i] = static_cast<V>(next);
    }
    if (in && combine)
      for (int64_t i = lo; i < hi; ++i) in[i + p.n] = in[i];
  });
}

}  // namespace mfd
