#pragma once
// What every binding needs from torch: the stable-ABI tensor, checks that name operator, argument,
// expected and got, typed pointers, and the dispatch over element types.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <string_view>

#include "cpu/scalar.h"

#ifdef MFD_WITH_CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace mfd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T* data_ptr(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* optional_ptr(const std::optional<Tensor>& t) {
  return t.has_value() ? data_ptr<T>(*t) : nullptr;
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// MFD_CHECK(op, condition, parts...): the message is "op: parts...".
#define MFD_CHECK(op, condition, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

inline void check_contiguous(const char* op, const Tensor& t, const char* name) {
  MFD_CHECK(op, t.is_contiguous(), name, " must be contiguous; call ", name, ".contiguous() first");
}

inline void check_same_shape(const char* op, const Tensor& a, const char* a_name, const Tensor& b,
                             const char* b_name) {
  MFD_CHECK(op, shape_text(a) == shape_text(b), a_name, " must have the shape of ", b_name, ", ",
            shape_text(b), "; got ", shape_text(a));
}

inline void check_dtype(const char* op, const Tensor& t, const char* name, ScalarType expected) {
  MFD_CHECK(op, t.scalar_type() == expected, name, " must be ",
            torch::headeronly::toString(expected), "; got ",
            torch::headeronly::toString(t.scalar_type()));
}

// The type that x is computed in, and of what it is multiplied with per sample.
inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of the element type of `t`: float, double, bfloat16 or float16 on the CPU.
template <typename F>
void dispatch_cpu(const char* op, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      MFD_CHECK(op, false, "expected float32, float64, bfloat16 or float16; got ",
                torch::headeronly::toString(t.scalar_type()));
  }
}

#ifdef MFD_WITH_CUDA
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The same for CUDA element types: float, __nv_bfloat16 or __half.
template <typename F>
void dispatch_cuda(const char* op, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      MFD_CHECK(op, false, "expected float32, bfloat16 or float16 on CUDA; got ",
                torch::headeronly::toString(t.scalar_type()));
  }
}
#endif

}  // namespace mfd
