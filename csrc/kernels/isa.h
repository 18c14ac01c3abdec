// Which instruction sets this build and this CPU have, and the choice between them.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "kernels/kernels.h"

namespace fixmin::kernels {

struct Isa {
    const char* name;  // as CMakeLists.txt lists them
    bool supported;    // by this CPU and operating system
    const Kernels* kernels;
};

/// All instruction sets of this build, slowest first.
const std::vector<Isa>& isas();

/// The kernels called `name`; the best supported ones for an empty name.
/// Throws ArgumentError for an unknown name, UnsupportedError if the CPU lacks the instructions.
const Kernels& select(std::string_view name = {});

/// select(FIXMIN_ISA), read once.
const Kernels& default_kernels();

/// Brand string from CPUID, or the architecture's name.
std::string cpu_name();

}  // namespace fixmin::kernels
