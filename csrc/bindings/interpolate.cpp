#include "cpu/interpolate.h"

#include "torch_utils.h"

namespace mfd {
namespace {

std::tuple<Tensor, Tensor> interpolate(const Tensor& x0, const Tensor& noise, const Tensor& t,
                                       bool with_target) {
  constexpr const char* op = "interpolate";
  check_contiguous(op, x0, "x0");
  check_contiguous(op, noise, "noise");
  check_contiguous(op, t, "t");
  check_same_shape(op, noise, "noise", x0, "x0");
  check_dtype(op, noise, "noise", x0.scalar_type());
  check_dtype(op, t, "t", ScalarType::Float);

  Tensor x_t = torch::stable::empty_like(x0);
  Tensor target = with_target ? torch::stable::empty_like(x0) : torch::stable::new_empty(x0, {0});
  if (x0.numel() == 0) return {x_t, target};
  dispatch_cpu(op, x0, [&](auto element) {
    using T = decltype(element);
    const InterpolateParams<T> params{
        .x0 = data_ptr<T>(x0),
        .noise = data_ptr<T>(noise),
        .t = data_ptr<float>(t),
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

}  // namespace
}  // namespace mfd

STABLE_TORCH_LIBRARY_IMPL(mfd_fast, CPU, m) { m.impl("interpolate", TORCH_BOX(&mfd::interpolate)); }
