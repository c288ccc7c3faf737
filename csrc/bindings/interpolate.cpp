#include "cpu/interpolate.h"

#include "torch_utils.h"

#ifdef MFD_WITH_CUDA
#include "cuda/interpolate.cuh"
#endif

namespace mfd {
namespace {

constexpr const char* op = "interpolate";

void check(const Tensor& x0, const Tensor& noise, const Tensor& t) {
  check_contiguous(op, x0, "x0");
  check_contiguous(op, noise, "noise");
  check_contiguous(op, t, "t");
  check_same_shape(op, noise, "noise", x0, "x0");
  check_dtype(op, noise, "noise", x0.scalar_type());
  check_dtype(op, t, "t", wide_type(x0));
}

std::tuple<Tensor, Tensor> make_outputs(const Tensor& x0, bool with_target) {
  return {torch::stable::empty_like(x0),
          with_target ? torch::stable::empty_like(x0) : torch::stable::new_empty(x0, {0})};
}

std::tuple<Tensor, Tensor> interpolate(const Tensor& x0, const Tensor& noise, const Tensor& t,
                                       bool with_target) {
  check(x0, noise, t);
  auto [x_t, target] = make_outputs(x0, with_target);
  if (x0.numel() == 0) return {x_t, target};
  dispatch_cpu(op, x0, [&, &x_t = x_t, &target = target](auto element) {
    using T = decltype(element);
    const InterpolateParams<T> params{
        .x0 = data_ptr<T>(x0),
        .noise = data_ptr<T>(noise),
        .t = data_ptr<accumulate_t<T>>(t),
        .x_t = data_ptr<T>(x_t),
        .target = with_target ? data_ptr<T>(target) : nullptr,
        .n = x0.numel() / x0.size(0),
    };
    torch::stable::parallel_for(0, x0.numel(), kGrain, [&](int64_t begin, int64_t end) {
      interpolate_cpu(params, begin, end);
    });
  });
  return {x_t, target};
}

#ifdef MFD_WITH_CUDA
std::tuple<Tensor, Tensor> interpolate_cuda(const Tensor& x0, const Tensor& noise, const Tensor& t,
                                            bool with_target) {
  check(x0, noise, t);
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  auto [x_t, target] = make_outputs(x0, with_target);
  if (x0.numel() == 0) return {x_t, target};
  dispatch_cuda(op, x0, [&, &x_t = x_t, &target = target](auto element) {
    using T = decltype(element);
    const cuda::InterpolateParams<T> params{
        .x0 = data_ptr<T>(x0),
        .noise = data_ptr<T>(noise),
        .t = data_ptr<float>(t),
        .x_t = data_ptr<T>(x_t),
        .target = with_target ? data_ptr<T>(target) : nullptr,
        .rows = x0.size(0),
        .n = x0.numel() / x0.size(0),
    };
    cuda::launch_interpolate(params, current_stream(x0));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {x_t, target};
}
#endif

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) { m.impl("interpolate", TORCH_BOX(&mfd::interpolate)); }
#ifdef MFD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CUDA, m) {
  m.impl("_interpolate_cuda", TORCH_BOX(&mfd::interpolate_cuda));
}
#endif
