#include "cpu/ode_step.h"

#include "torch_utils.h"

#ifdef MFD_WITH_CUDA
#include "cuda/ode_step.cuh"
#endif

namespace mfd {
namespace {

constexpr const char* op = "ode_step_";

void check(const Tensor& x, const Tensor& v, const std::optional<Tensor>& history,
           const Tensor& coef, const std::optional<Tensor>& input) {
  check_contiguous(op, x, "x");
  check_contiguous(op, v, "v");
  check_contiguous(op, coef, "coef");
  check_dtype(op, coef, "coef", wide_type(x));
  if (history) check_contiguous(op, *history, "history");
  if (input) check_contiguous(op, *input, "x_in");
}

template <typename X, typename V>
void run(const Tensor& x, const Tensor& v, const std::optional<Tensor>& history, const Tensor& coef,
         double guidance, const std::optional<Tensor>& input) {
  const OdeStepParams<X, V> params{
      .x = data_ptr<X>(x),
      .v = data_ptr<V>(v),
      .history = optional_ptr<X>(history),
      .coef = data_ptr<X>(coef),
      .input = optional_ptr<V>(input),
      .guidance = static_cast<X>(guidance),
      .guided = v.size(1) == x.size(1) + 1,
      .trajectories = x.size(1),
      .lanes = v.size(1),
      .n = x.numel() / (x.size(0) * x.size(1)),
  };
  torch::stable::parallel_for(
      0, x.numel(), kGrain, [&](int64_t begin, int64_t end) { ode_step_cpu(params, begin, end); });
}

void ode_step_(const Tensor& x, const Tensor& v, const std::optional<Tensor>& history,
               const Tensor& coef, double guidance, const std::optional<Tensor>& input) {
  check(x, v, history, coef, input);
  if (x.numel() == 0) return;

  if (x.scalar_type() == ScalarType::Double) {
    check_dtype(op, v, "v", ScalarType::Double);
    return run<double, double>(x, v, history, coef, guidance, input);
  }
  check_dtype(op, x, "x", ScalarType::Float);
  dispatch_cpu(op, v, [&](auto element) {
    using V = decltype(element);
    if constexpr (std::is_same_v<V, double>) {
      MFD_CHECK(op, false, "v must not be float64 when x is float32");
    } else {
      run<float, V>(x, v, history, coef, guidance, input);
    }
  });
}

#ifdef MFD_WITH_CUDA
void ode_step_cuda(const Tensor& x, const Tensor& v, const std::optional<Tensor>& history,
                   const Tensor& coef, double guidance, const std::optional<Tensor>& input) {
  check(x, v, history, coef, input);
  check_dtype(op, x, "x", ScalarType::Float);
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  dispatch_cuda(op, v, [&](auto element) {
    using V = decltype(element);
    const cuda::OdeStepParams<V> params{
        .x = data_ptr<float>(x),
        .v = data_ptr<V>(v),
        .history = optional_ptr<float>(history),
        .coef = data_ptr<float>(coef),
        .input = optional_ptr<V>(input),
        .guidance = static_cast<float>(guidance),
        .guided = v.size(1) == x.size(1) + 1,
        .batch = x.size(0),
        .trajectories = x.size(1),
        .lanes = v.size(1),
        .n = x.numel() / (x.size(0) * x.size(1)),
    };
    cuda::launch_ode_step(params, current_stream(x));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) { m.impl("ode_step_", TORCH_BOX(&mfd::ode_step_)); }
#ifdef MFD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CUDA, m) {
  m.impl("_ode_step__cuda", TORCH_BOX(&mfd::ode_step_cuda));
}
#endif
