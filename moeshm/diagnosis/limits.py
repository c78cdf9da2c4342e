"""Cores, memory, and the limits that this process runs under."""

from __future__ import annotations

import os
import re
import resource
from pathlib import PurePosixPath

from .. import process
from .finding import Finding, describe, read, size

#: Docker's default for /dev/shm. The two rings of a client that sends 1024 tokens of hidden size
#: 7168 in float32 take 32 MiB each and their control pages: just too much for it.
RINGS_BYTES = 64 << 20


def check_cores() -> Finding:
    """CPUs that this process may run on."""
    usable = process.usable_cpus()
    if usable == 1:
        return Finding(
            "cores",
            "degraded",
            "1 usable: spinning is off, every message costs a context switch",
            "allow a second one (taskset, docker --cpuset-cpus)",
        )
    return Finding("cores", "ok", f"{usable} usable of {os.cpu_count()}")


def check_memory() -> Finding:
    """Memory of the machine."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read("/proc/meminfo") or "", re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= fields.keys():
        return Finding("memory", "degraded", "unknown", "mount /proc")
    total, available = (int(fields[key]) << 10 for key in ("MemTotal", "MemAvailable"))
    value = f"{size(available)} available of {size(total)}"
    if available < RINGS_BYTES:
        return Finding("memory", "degraded", value, "end what else uses it, or add some")
    return Finding("memory", "ok", value)


def check_cgroup_memory() -> Finding:
    """The tightest memory limit of this process's control groups; segments count against it."""
    texts = [(read(path) or "").strip() for path in _cgroup_limit_files()]
    # Version 1 writes a number near 2^63 for "no limit".
    limits = [int(text) for text in texts if text.isdecimal() and int(text) < 1 << 60]
    if not limits:
        return Finding("cgroup_memory", "ok", "no limit")
    value = f"limit {size(min(limits))}"
    if min(limits) < RINGS_BYTES:
        remedy = "raise it (docker --memory, systemd MemoryMax=)"
        return Finding("cgroup_memory", "degraded", value, remedy)
    return Finding("cgroup_memory", "ok", value)


def _cgroup_limit_files() -> list[str]:
    """Where this process's group and its parents keep their limit, in either version."""
    files = []
    for line in (read("/proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            root, leaf = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, leaf = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        files += [f"{root}{str(at).rstrip('/')}/{leaf}" for at in (group, *group.parents)]
    return files


def check_memlock() -> Finding:
    """RLIMIT_MEMLOCK; moeshm itself locks nothing."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "no limit" if soft == resource.RLIM_INFINITY else f"limit {size(soft)}"
    return Finding("memlock", "ok", f"{value}; moeshm locks no memory")


def check_address_space() -> Finding:
    """RLIMIT_AS: a ring maps its data area twice, in both processes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return Finding("address_space", "ok", "no limit")
    pages = int((read("/proc/self/statm") or "0").split()[0])
    left = max(0, soft - pages * resource.getpagesize())
    value = f"limit {size(soft)}, {size(left)} left to this process"
    if left < 2 * RINGS_BYTES:
        return Finding("address_space", "degraded", value, "raise it (ulimit -v unlimited)")
    return Finding("address_space", "ok", value)


def check_dev_shm() -> Finding:
    """Room for named segments; anonymous ones (memfd) are not bound by it."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding(
            "dev_shm",
            "missing",
            f"{describe(error)}; no rings by name, anonymous ones (memfd) do without",
            "mount -t tmpfs tmpfs /dev/shm",
        )
    total, free = (blocks * space.f_frsize for blocks in (space.f_blocks, space.f_bavail))
    value = f"{size(free)} free of {size(total)}"
    if free <= RINGS_BYTES:
        return Finding(
            "dev_shm",
            "degraded",
            f"{value}: little for rings by name; anonymous ones (memfd) are not bound by it",
            "remove what is left in /dev/shm, or enlarge it (docker --shm-size=1g)",
        )
    return Finding("dev_shm", "ok", value)
