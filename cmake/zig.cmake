# Compiles with zig c++ (clang and libc++; the package ziglang on PyPI) for an older glibc than this machine's, for another
# processor or another system:
#   cmake -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake -DFIXMIN_TARGET=aarch64-linux-gnu.2.28 -DFIXMIN_ZIG=.../zig
set(FIXMIN_TARGET x86_64-linux-gnu.2.28 CACHE STRING "What to compile for, as zig calls it")
set(FIXMIN_ZIG zig CACHE STRING "The program zig")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES FIXMIN_TARGET FIXMIN_ZIG)

string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR ${FIXMIN_TARGET})
if(FIXMIN_TARGET MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
  set(CMAKE_OSX_SYSROOT "")  # zig brings the headers; there is no Xcode to ask
elseif(FIXMIN_TARGET MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
set(CMAKE_CXX_COMPILER ${FIXMIN_ZIG} c++ -target ${FIXMIN_TARGET})
# This machine's ar may not read the objects of another processor.
set(CMAKE_CXX_ARCHIVE_CREATE "${FIXMIN_ZIG} ar qcs <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_APPEND "${FIXMIN_ZIG} ar qs <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")
