# Sets archs, the compute capabilities to build for, and gencode, nvcc's flags for them, from
# MFD_CUDA_ARCHS and what MFD_NVCC says that it knows.
execute_process(COMMAND ${MFD_NVCC} --version OUTPUT_VARIABLE said COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "release ([0-9.]+)" _ "${said}")
set(nvcc_version ${CMAKE_MATCH_1})
if(nvcc_version VERSION_LESS 12.0)
  message(FATAL_ERROR "mfd-fast: nvcc >= 12.0 is needed for C++20, ${MFD_NVCC} is ${nvcc_version}; \
put a newer CUDA toolkit first on the PATH, or build without CUDA kernels: MFD_CUDA=OFF")
endif()
execute_process(COMMAND ${MFD_NVCC} --list-gpu-code OUTPUT_VARIABLE said COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9]+" known "${said}")

set(archs "")
set(unknown "")
set(wanted ${MFD_CUDA_ARCHS})
if(NOT wanted)
  set(wanted 80 90a 100 120)
endif()
foreach(arch IN LISTS wanted)
  string(REGEX MATCH "^[0-9]+" number "${arch}")  # 90a is 90 with its own instructions
  if(number IN_LIST known)
    list(APPEND archs ${arch})
  else()
    list(APPEND unknown ${arch})
  endif()
endforeach()
if(NOT archs OR (MFD_CUDA_ARCHS AND unknown))
  string(REPLACE ";" " " unknown "${unknown}")
  string(REPLACE ";" " " known "${known}")
  message(FATAL_ERROR "mfd-fast: nvcc ${nvcc_version} cannot build for compute capability ${unknown}, \
it knows ${known}; put a newer CUDA toolkit first on the PATH (12.8 knows 100 and 120), or leave \
MFD_CUDA_ARCHS out to build for what this one knows")
endif()

set(gencode "")
foreach(arch IN LISTS archs)
  list(APPEND gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
endforeach()
if(NOT MFD_CUDA_ARCHS)  # GPUs that nvcc does not know yet compile the newest PTX when they load it
  list(GET archs -1 newest)
  string(REGEX MATCH "^[0-9]+" newest "${newest}")
  list(APPEND gencode "-gencode=arch=compute_${newest},code=compute_${newest}")
  list(APPEND archs "${newest}+PTX")
endif()
