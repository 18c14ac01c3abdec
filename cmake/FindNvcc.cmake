# The compiler of the kernels in csrc/cuda, and what it is told.

# Sets FIXMIN_NVCC, or PROBLEM to the reason why there is none. The first of: FIXMIN_NVCC, CUDA_HOME or CUDA_PATH in the
# environment, the package nvidia-cuda-nvcc of the Python that builds (pyproject.toml: FIXMIN_NVCC_FROM_PIP), PATH, the
# usual folder.
function(fixmin_find_nvcc PROBLEM)
  if(NOT FIXMIN_NVCC)
    find_package(Python QUIET COMPONENTS Interpreter)
    if(Python_Interpreter_FOUND)
      execute_process(COMMAND ${Python_EXECUTABLE} -c
        "import glob, nvidia; print(';'.join(bin for path in nvidia.__path__ for bin in glob.glob(path + '/cu*/bin')))"
        OUTPUT_VARIABLE of_python ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    endif()
    find_program(FIXMIN_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH ${of_python} PATHS /usr/local/cuda PATH_SUFFIXES bin)
  endif()
  if(FIXMIN_NVCC)
    set(${PROBLEM} "" PARENT_SCOPE)
  else()
    set(${PROBLEM} "nvcc is not found: set CUDA_HOME or FIXMIN_NVCC, or FIXMIN_NVCC_FROM_PIP=1 in the environment" PARENT_SCOPE)
  endif()
endfunction()

# The options that make kernels.fatbin into OPTIONS, or the reason why there are none into PROBLEM. Of
# FIXMIN_CUDA_ARCHITECTURES those that this nvcc does not know are left out: as PTX the kernels run there too.
function(fixmin_nvcc_options OPTIONS PROBLEM)
  set(${PROBLEM} "" PARENT_SCOPE)
  # Contracts of docs/numerics.md: no fused product but where the code says fma, IEEE division and square root.
  set(options -std=c++20 -O3 -I${CMAKE_CURRENT_SOURCE_DIR}/csrc --fmad=false --ftz=false --prec-div=true
    --prec-sqrt=true --expt-relaxed-constexpr --threads 0 -Wno-deprecated-gpu-targets)
  execute_process(COMMAND ${FIXMIN_NVCC} --version OUTPUT_VARIABLE version ERROR_VARIABLE version_error)
  execute_process(COMMAND ${FIXMIN_NVCC} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  if(NOT version MATCHES "release ([0-9]+[.][0-9]+)")
    set(${PROBLEM} "${FIXMIN_NVCC} does not run: ${version}${version_error}" PARENT_SCOPE)
    return()
  endif()
  set(release ${CMAKE_MATCH_1})
  string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
  if(release VERSION_LESS 12.0)
    set(${PROBLEM} "${FIXMIN_NVCC} is of CUDA ${release}, and 12.0 or later is needed" PARENT_SCOPE)
    return()
  elseif(release VERSION_GREATER_EQUAL 13.0)
    list(APPEND options --compress-mode=size)  # every driver that takes what CUDA 13 makes can unpack it
  endif()
  if(FIXMIN_CUDA_ARCHITECTURES STREQUAL "native")
    list(APPEND options -arch=native)
    set(compiled native)
  else()
    foreach(architecture ${FIXMIN_CUDA_ARCHITECTURES})
      if(sm_${architecture} IN_LIST known)
        list(APPEND options -gencode arch=compute_${architecture},code=sm_${architecture})
        list(APPEND compiled ${architecture})
      else()
        list(APPEND unknown ${architecture})
      endif()
    endforeach()
    list(APPEND options -gencode arch=compute_90,code=compute_90)  # PTX, for chips that come later
  endif()
  if(NOT compiled)
    set(${PROBLEM} "${FIXMIN_NVCC} of CUDA ${release} knows none of the architectures ${unknown}" PARENT_SCOPE)
    return()
  elseif(unknown)
    message(WARNING "nvcc of CUDA ${release} does not know the architectures ${unknown}: GPUs of these run PTX, which "
      "the driver compiles when a model is loaded. CUDA 12.8 or later knows 100 and 120.")
  endif()
  message(STATUS "Kernels for GPUs: ${FIXMIN_NVCC}, CUDA ${release}, architectures ${compiled}")
  set(${OPTIONS} ${options} PARENT_SCOPE)
endfunction()
