"""The checks behind `moeshm doctor`, each with what it looks at bent."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import posix_ipc
import pytest

import moeshm
from moeshm import process, segment, settings
from moeshm.diagnosis import computing, limits, system_calls, versions
from moeshm.diagnosis.finding import Finding, size

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
GIB = 1 << 30


def fails_with(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# --- versions -----------------------------------------------------------------------------


def test_minimum_versions_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    required = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', text))
    for package in versions.PACKAGES:
        names = [name for name in package.distributions or (package.name,) if name in required]
        assert names, package.name
        assert {required[name] for name in names} == {package.minimum}


def package(name: str) -> versions.Package:
    return next(package for package in versions.PACKAGES if package.name == name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What importlib.metadata believes to be installed: nothing, until a test adds it."""
    installed: dict[str, str] = {}

    def version(distribution: str) -> str:
        try:
            return installed[distribution]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(distribution) from None

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    return installed


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "remedy"),
    [("numpy", "numpy>=1.26"), ("cupy", "moeshm[cuda13]"), ("torch", "moeshm[transformers]")],
)
def test_a_missing_package_names_what_to_install(name: str, remedy: str) -> None:
    finding = versions.check_package(package(name))
    assert finding.status == "missing"
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("numpy", "1.25.2", "degraded"),
        ("numpy", "1.26.0rc1", "ok"),
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.3.1", "degraded"),
        ("safetensors", "0.4.2", "degraded"),
    ],
)
def test_versions_are_compared_as_numbers(
    installed: dict[str, str], name: str, version: str, status: str
) -> None:
    installed[name] = version
    finding = versions.check_package(package(name))
    assert (finding.status, finding.value) == (status, version)


def test_cupy_is_found_under_its_other_names(installed: dict[str, str]) -> None:
    installed["cupy-cuda12x"] = "14.2.0"
    finding = versions.check_package(package("cupy"))
    assert (finding.status, finding.value) == ("ok", "14.2.0 (cupy-cuda12x)")
    installed["cupy-cuda12x"] = "13.6.0"
    finding = versions.check_package(package("cupy"))
    assert finding.status == "degraded"
    assert "'cupy-cuda12x>=14'" in finding.remedy


def test_a_package_without_metadata_is_not_called_missing(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert installed == {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: f"a spec of {name}")
    assert versions.check_package(package("numpy")).status == "ok"
    assert versions.check_moeshm().status == "degraded"


@pytest.mark.parametrize(("version", "status"), [("3.9.19", "missing"), ("3.10.0", "ok")])
def test_python(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: version)
    assert versions.check_python().status == status


@pytest.mark.parametrize(
    ("system", "release", "status"),
    [
        ("Linux", "5.2.21", "degraded"),
        ("Linux", "5.15.0-91-generic", "ok"),
        ("Linux", "6.1", "ok"),
        ("Darwin", "24.0.0", "missing"),
    ],
)
def test_kernel(monkeypatch: pytest.MonkeyPatch, system: str, release: str, status: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert versions.check_kernel().status == status


def test_an_extension_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moeshm._ring", None)
    monkeypatch.delattr(moeshm, "_ring", raising=False)
    extension, ring = versions.check_extension(), system_calls.check_ring()
    assert (extension.status, ring.status) == ("missing", "missing")
    assert "not built" in extension.value
    assert "build_ext" in extension.remedy


# --- limits -------------------------------------------------------------------------------


def test_one_core_turns_spinning_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "usable_cpus", lambda: 1)
    finding = limits.check_cores()
    assert finding.status == "degraded"
    assert "spinning is off" in finding.value


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The only files that the checks of limits can read."""
    files: dict[str, str] = {}
    monkeypatch.setattr(limits, "read", files.get)
    return files


@pytest.mark.parametrize(("available", "status"), [(8 * GIB, "ok"), (40 * MIB, "degraded")])
def test_memory(files: dict[str, str], available: int, status: str) -> None:
    files["/proc/meminfo"] = (
        f"MemTotal:       {16 * GIB >> 10} kB\n"
        f"MemAvailable:   {available >> 10} kB\n"
        "HugePages_Total:       0\n"
    )
    finding = limits.check_memory()
    assert finding.status == status
    assert finding.value == f"{size(available)} available of 16.0 GiB"


def test_memory_without_proc(files: dict[str, str]) -> None:
    assert files == {}
    assert limits.check_memory().status == "degraded"


def test_the_tightest_cgroup_limit_counts_in_version_2(files: dict[str, str]) -> None:
    files["/proc/self/cgroup"] = "0::/system.slice/moeshm.service\n"
    files["/sys/fs/cgroup/system.slice/moeshm.service/memory.max"] = "max\n"
    assert limits.check_cgroup_memory() == Finding("cgroup_memory", "ok", "no limit")
    files["/sys/fs/cgroup/system.slice/memory.max"] = f"{2 * GIB}\n"
    assert limits.check_cgroup_memory() == Finding("cgroup_memory", "ok", "limit 2.0 GiB")
    # A container sees its own group at the root.
    files["/sys/fs/cgroup/memory.max"] = f"{32 * MIB}\n"
    finding = limits.check_cgroup_memory()
    assert (finding.status, finding.value) == ("degraded", "limit 32.0 MiB")


def test_cgroup_limits_of_version_1(files: dict[str, str]) -> None:
    files["/proc/self/cgroup"] = "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n"
    files["/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert limits.check_cgroup_memory().value == "no limit"
    files["/sys/fs/cgroup/memory/docker/memory.limit_in_bytes"] = f"{3 * GIB}\n"
    assert limits.check_cgroup_memory().value == "limit 3.0 GiB"


@pytest.mark.parametrize(
    ("limit", "status"),
    [(resource.RLIM_INFINITY, "ok"), (GIB, "ok"), (900 * MIB, "degraded")],
)
def test_address_space(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, limit: int, status: str
) -> None:
    files["/proc/self/statm"] = f"{800 * MIB // mmap.PAGESIZE} 1 1 1 0 1 0\n"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert limits.check_address_space().status == status


def test_memlock_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 << 10, 64 << 10))
    finding = limits.check_memlock()
    assert finding.status == "ok"
    assert "64.0 KiB" in finding.value


def test_a_small_dev_shm_is_degraded_with_dockers_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 64 * MIB // 4096
    space = SimpleNamespace(f_frsize=4096, f_blocks=blocks, f_bavail=blocks)
    monkeypatch.setattr(os, "statvfs", lambda _: space)
    finding = limits.check_dev_shm()
    assert finding.status == "degraded"
    assert "64.0 MiB free of 64.0 MiB" in finding.value
    assert "memfd" in finding.value
    assert "--shm-size" in finding.remedy


def test_no_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", fails_with(errno.ENOENT))
    assert limits.check_dev_shm().status == "missing"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 bytes"), (1 << 10, "1.0 KiB"), (3 * MIB // 2, "1.5 MiB"), (80 * GIB, "80.0 GiB")],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert size(size_bytes) == text


# --- system calls -------------------------------------------------------------------------


def test_memfd_refused_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", fails_with(errno.ENOSYS))
    finding = system_calls.check_memfd()
    assert finding.status == "missing"
    assert "Function not implemented" in finding.value
    assert "seccomp" in finding.remedy
    ring = system_calls.check_ring()
    assert ring.status == "missing"
    assert "memfd" in ring.remedy


def test_memfd_that_takes_no_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "create_anonymous", lambda _: os.memfd_create("moeshm"))
    finding = system_calls.check_memfd()
    assert finding.status == "missing"
    assert "seals" in finding.value


def test_seals_that_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)
    finding = system_calls.check_memfd()
    assert finding.status == "missing"
    assert "resized" in finding.value


def test_posix_shm_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise posix_ipc.PermissionsError("no")

    monkeypatch.setattr(posix_ipc, "SharedMemory", refuse)
    finding = system_calls.check_posix_shm()
    assert finding.status == "missing"
    assert "PermissionsError" in finding.value


def test_pidfd_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pidfd_open", fails_with(errno.EPERM))
    finding = system_calls.check_pidfd()
    assert finding.status == "degraded"
    assert "Operation not permitted" in finding.value


def test_futex_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(system_calls, "_futex_errno", lambda _: errno.ENOSYS)
    finding = system_calls.check_futex()
    assert finding.status == "missing"
    assert "Function not implemented" in finding.value


def test_futex_probe_tells_a_call_that_does_not_exist() -> None:
    assert system_calls._futex_errno(4000) == errno.ENOSYS


def test_futex_is_not_tried_where_its_number_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "loongarch64")
    finding = system_calls.check_futex()
    assert finding.status == "ok"
    assert "not tried" in finding.value


def test_no_seqpacket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socketpair", fails_with(errno.EPROTONOSUPPORT))
    assert system_calls.check_unix_socket().status == "missing"


def test_descriptors_refused_or_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "recv_fds", lambda *_: (b"fd", [], 0, None))
    assert "it did not arrive" in system_calls.check_unix_socket().value
    monkeypatch.setattr(socket, "send_fds", fails_with(errno.EPERM))
    finding = system_calls.check_unix_socket()
    assert finding.status == "degraded"
    assert "Operation not permitted" in finding.value


# --- computing ----------------------------------------------------------------------------


def test_blas_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in computing.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    blas = {"found": True, "name": "scipy-openblas", "version": "0.3.31"}
    config: dict[str, Any] = {"Build Dependencies": {"blas": blas}}
    monkeypatch.setattr(np, "show_config", lambda mode: config if mode == "dicts" else None)
    assert computing.check_blas().value == "scipy-openblas 0.3.31, threads: its own default"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert computing.check_blas().value == "scipy-openblas 0.3.31, OMP_NUM_THREADS=2"
    blas["found"] = False
    assert computing.check_blas().status == "degraded"


def test_simd_lists_what_numpy_found(monkeypatch: pytest.MonkeyPatch) -> None:
    simd = {"baseline": ["SSE", "SSE2"], "found": ["AVX2"], "not found": ["AVX512F"]}
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": simd} if mode else {})
    assert computing.check_simd().value == "baseline SSE SSE2; found AVX2"
    del simd["found"]
    assert computing.check_simd().value == "baseline SSE SSE2; found none"


def test_settings_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "current", lambda: settings.Settings(spin_us=7.5))
    finding = computing.check_settings()
    assert finding.status == "ok"
    assert "spin_us=7.5" in finding.value
