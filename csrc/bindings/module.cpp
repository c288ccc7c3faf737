// The Python module mfd_fast._C.  Importing it registers every operator of csrc/bindings; the
// module itself only says how it was built (`mfd-fast info` prints it).
//
// Torch 2.11 and 2.12 refuse their pybind11 to a file that targets the stable ABI; this file uses
// nothing of torch, so it targets none.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#ifndef MFD_BUILD_CUDA_ARCHS
#define MFD_BUILD_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of mfd_fast";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = MFD_BUILD_TORCH;
    info["compiler"] = MFD_BUILD_COMPILER;
    info["native"] = static_cast<bool>(MFD_BUILD_NATIVE);
    info["cuda_archs"] = MFD_BUILD_CUDA_ARCHS;
#ifdef MFD_WITH_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    return info;
  });
}
