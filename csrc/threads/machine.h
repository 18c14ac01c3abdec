// What the control groups of this process leave it of the machine.
#pragma once
#include <cstdint>
#include <string>

namespace fixmin::threads {

struct CgroupLimits {
    double cpus = 1e9;  // by quota
    double memory_bytes = 1e18;
    uint32_t cpuset = 1u << 30;  // CPUs in the set
};

/// The smallest limit on the way from the root to the group of this process, of versions 1 and 2. `root` stands before
/// /proc/self and the mount points that it names. Files that are absent or unreadable limit nothing.
CgroupLimits cgroup_limits(const std::string& root = "");

/// Of the machine, or of the control group if that has less.
double memory_bytes();

}  // namespace fixmin::threads
