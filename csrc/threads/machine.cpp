#include "threads/machine.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>
#include <vector>

namespace fixmin::threads {
namespace {

bool lists(const std::string& names, const std::string& name) {
    return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

struct Mount {
    std::string root;   // the group that is seen there
    std::string point;  // where
};

// mountinfo writes a blank as \040.
std::string unescape(const std::string& text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '\\' && i + 3 < text.size() && text.find_first_not_of("01234567", i + 1) > i + 3) {
            out += char((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
            i += 3;
        } else {
            out += text[i];
        }
    }
    return out;
}

// Of the unified hierarchy if `controller` is empty.
std::optional<Mount> find_mount(const std::string& root, const std::string& controller) {
    std::ifstream file(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        std::istringstream front(line), back(line.substr(dash + 3));
        std::string id, parent, device, seen, point, type, source, options;
        front >> id >> parent >> device >> seen >> point;
        back >> type >> source >> options;
        if (controller.empty() ? type == "cgroup2" : type == "cgroup" && lists(options, controller))
            return Mount{unescape(seen), root + unescape(point)};
    }
    return std::nullopt;
}

// The group of this process; nothing if it is in none of that hierarchy.
std::optional<std::string> find_group(const std::string& root, const std::string& controller) {
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string names = line.substr(first + 1, second - first - 1);
        if (controller.empty() ? names.empty() : lists(names, controller)) return line.substr(second + 1);
    }
    return std::nullopt;
}

// The folders of the group and of all above it that can be seen, the group first.
std::vector<std::string> folders(const std::string& root, const std::string& controller) {
    const auto mount = find_mount(root, controller);
    const auto group = find_group(root, controller);
    if (!mount || !group) return {};
    std::string below = *group;
    if (mount->root != "/") {
        // A container sees its own group as the mount's root. Elsewhere the group lies outside of what is mounted.
        const bool inside =
            below.starts_with(mount->root) && (below.size() == mount->root.size() || below[mount->root.size()] == '/');
        below = inside ? below.substr(mount->root.size()) : "";
    }
    std::vector<std::string> found;
    for (; !below.empty() && below != "/"; below.resize(below.rfind('/'))) {
        if (below.find("/..") != std::string::npos) break;  // above the namespace
        found.push_back(mount->point + below);
    }
    found.push_back(mount->point);
    return found;
}

std::optional<double> number(const std::string& path) {
    double value;
    if (std::ifstream(path) >> value) return value;  // not "max"
    return std::nullopt;
}

// CPUs in a list such as 0-3,8.
uint32_t count_cpus(const std::string& path) {
    std::ifstream file(path);
    uint32_t n = 0;
    for (std::string part; std::getline(file, part, ',');) {
        uint32_t first, last;
        char dash;
        std::istringstream in(part);
        if (!(in >> first)) continue;
        n += in >> dash >> last && dash == '-' && last >= first ? last - first + 1 : 1;
    }
    return n;
}

void take_cpuset(CgroupLimits& limits, const std::string& path) {
    if (const uint32_t n = count_cpus(path)) limits.cpuset = std::min(limits.cpuset, n);
}

void take_memory(CgroupLimits& limits, const std::string& path) {
    if (const auto bytes = number(path)) limits.memory_bytes = std::min(limits.memory_bytes, *bytes);
}

void take_quota(CgroupLimits& limits, std::optional<double> quota, std::optional<double> period) {
    if (quota && period && *quota > 0 && *period > 0) limits.cpus = std::min(limits.cpus, *quota / *period);
}

}  // namespace

CgroupLimits cgroup_limits(const std::string& root) {
    CgroupLimits limits;
    for (const std::string& folder : folders(root, "")) {
        double quota, period;
        if (std::ifstream file(folder + "/cpu.max"); file >> quota >> period) take_quota(limits, quota, period);
        take_memory(limits, folder + "/memory.max");
        take_memory(limits, folder + "/memory.high");
        take_cpuset(limits, folder + "/cpuset.cpus.effective");
    }
    for (const std::string& folder : folders(root, "cpu"))
        take_quota(limits, number(folder + "/cpu.cfs_quota_us"), number(folder + "/cpu.cfs_period_us"));
    for (const std::string& folder : folders(root, "memory")) take_memory(limits, folder + "/memory.limit_in_bytes");
    for (const std::string& folder : folders(root, "cpuset")) take_cpuset(limits, folder + "/cpuset.cpus");
    return limits;
}

double memory_bytes() {
    const double bytes = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
    return std::min(bytes, cgroup_limits().memory_bytes);
}

}  // namespace fixmin::threads
