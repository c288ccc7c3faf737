#pragma once
// One step of a linear multistep solver for every trajectory of every sample, guidance included.
//
//   v_s   = v_uncond + w (v_cond - v_uncond)   for the guided trajectory s = 0, else its own lane
//   x'_s  = a x_s + b v_s + c h_s              coefficients (a, b, c, p, q) per sample
//   h'_s  = p x_s + q v_s                      what the solver remembers (optional)
//   input = x'_s in the model's dtype, written to every lane of that trajectory (optional)
//
// x, h [batch, trajectories, n] float; v, input [batch, lanes, n]; lanes = trajectories (+ 1 if
// guided: lane 0 conditional, lane 1 unconditional).  Traffic: see ops/ode_step.py.
#include <cuda_runtime.h>

#include <cstdint>

namespace mfd::cuda {

template <typename V>
struct OdeStepParams {
  float* x;
  const V* v;
  float* history;     // null: single-step solver
  const float* coef;  // [batch, 5]
  V* input;           // null: the model reads x itself
  float guidance;
  bool guided;
  int64_t batch, trajectories, lanes, n;
};

template <typename V>
void launch_ode_step(const OdeStepParams<V>& params, cudaStream_t stream);

}  // namespace mfd::cuda
