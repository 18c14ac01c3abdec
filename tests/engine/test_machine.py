"""CPU and memory limits of control groups, read from trees that look like /proc and /sys/fs/cgroup."""

from pathlib import Path

from fixmin_cpp import _core

V2 = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:27 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 / /cg/memory rw - cgroup cgroup rw,memory\n"
    "33 23 0:29 / /cg/cpu\\040set rw - cgroup cgroup rw,cpuset\n"
)


def tree(root: Path, mounts: str, groups: str, files: dict[str, str]) -> dict[str, float]:
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _core.cgroup_limits(str(root))


def test_no_files_no_limits(tmp_path):
    limits = _core.cgroup_limits(str(tmp_path))
    assert min(limits.values()) >= 1e9


def test_version_2_takes_the_smallest_on_the_way(tmp_path):
    base = "sys/fs/cgroup"
    files = {
        f"{base}/a/cpu.max": "150000 100000\n",
        f"{base}/a/b/cpu.max": "max 100000\n",
        f"{base}/a/b/memory.max": "3000000\n",
        f"{base}/a/memory.max": "max\n",
        f"{base}/memory.max": "5000000\n",
        f"{base}/other/cpu.max": "1000 100000\n",
        f"{base}/a/b/cpuset.cpus.effective": "0-2,7\n",
    }
    assert tree(tmp_path, V2, "0::/a/b\n", files) == {"cpus": 1.5, "memory_bytes": 3e6, "cpuset": 4}


def test_version_1(tmp_path):
    files = {
        "cg/cpu/x/y/cpu.cfs_quota_us": "-1\n",
        "cg/cpu/x/y/cpu.cfs_period_us": "100000\n",
        "cg/cpu/x/cpu.cfs_quota_us": "50000\n",
        "cg/cpu/x/cpu.cfs_period_us": "20000\n",
        "cg/memory/m/memory.limit_in_bytes": "700000\n",
        "cg/cpu set/s/cpuset.cpus": "3\n",
    }
    groups = "5:cpuset:/s\n4:memory:/m\n3:cpuacct,cpu:/x/y\n0::/\n"
    assert tree(tmp_path, V1, groups, files) == {"cpus": 2.5, "memory_bytes": 7e5, "cpuset": 1}


def test_a_container_whose_group_is_the_root_of_the_mount(tmp_path):
    mounts = "30 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    files = {"sys/fs/cgroup/cpu.max": "100000 100000\n", "sys/fs/cgroup/in/memory.max": "9\n"}
    limits = tree(tmp_path, mounts, "0::/docker/abc/in\n", files)
    assert (limits["cpus"], limits["memory_bytes"]) == (1, 9)


def test_nonsense_limits_nothing(tmp_path):
    files = {
        "sys/fs/cgroup/cpu.max": "abc def\n",
        "sys/fs/cgroup/memory.max": "",
        "sys/fs/cgroup/cpuset.cpus.effective": "\n",
    }
    assert min(tree(tmp_path, V2 + "broken\n", "0::/../..\nbroken\n", files).values()) >= 1e9
