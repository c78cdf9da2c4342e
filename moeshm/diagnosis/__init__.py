"""What this machine offers moeshm: every check tries the thing itself and names the remedy.

Checks import what they look at only when they run: what is missing becomes a finding, and no
traceback.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

import msgspec

from . import computing, gpus, limits, system_calls, versions
from .finding import Finding, describe

#: In the order of the report.
CHECKS: tuple[tuple[str, Callable[[], Finding | list[Finding]]], ...] = (
    ("moeshm", versions.check_moeshm),
    ("extension", versions.check_extension),
    ("settings", computing.check_settings),
    ("python", versions.check_python),
    *(
        (package.name, functools.partial(versions.check_package, package))
        for package in versions.PACKAGES
    ),
    ("kernel", versions.check_kernel),
    ("cores", limits.check_cores),
    ("memory", limits.check_memory),
    ("cgroup_memory", limits.check_cgroup_memory),
    ("memlock", limits.check_memlock),
    ("address_space", limits.check_address_space),
    ("dev_shm", limits.check_dev_shm),
    ("memfd", system_calls.check_memfd),
    ("posix_shm", system_calls.check_posix_shm),
    ("pidfd", system_calls.check_pidfd),
    ("futex", system_calls.check_futex),
    ("ring", system_calls.check_ring),
    ("unix_socket", system_calls.check_unix_socket),
    ("blas", computing.check_blas),
    ("simd", computing.check_simd),
    ("gpu", gpus.check_gpus),
)

#: moeshm runs nothing while one of these is missing.
ESSENTIAL = (
    *("python", "kernel", "extension", "settings", "unix_socket"),
    *(package.name for package in versions.PACKAGES if package.is_essential),
)
#: The shared transport needs these to be ok; the stream transport does without.
SHARED_NEEDS = ("memfd", "futex", "ring", "unix_socket")


class Auto(msgspec.Struct, frozen=True):
    """What `auto` picks here; both None where moeshm cannot run at all."""

    transport: str | None
    device: str | None
    #: Why this transport, and why this device.
    transport_reason: str
    device_reason: str


class Diagnosis(msgspec.Struct, frozen=True):
    """All findings, and what follows from them."""

    findings: list[Finding]
    auto: Auto


def diagnose() -> Diagnosis:
    """Run every check, the GPUs' included."""
    findings = [finding for name, check in CHECKS for finding in run_check(name, check)]
    return Diagnosis(findings, choose(findings))


def run_check(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """The check's findings; one that raises is itself a finding."""
    try:
        found = check()
    except Exception as error:  # a broken driver or package may raise anything
        found = Finding(
            name,
            "missing",
            f"the check itself failed: {describe(error)}",
            "reinstall what the message names, or report it as a bug of moeshm doctor",
        )
    return found if isinstance(found, list) else [found]


def choose(findings: Iterable[Finding]) -> Auto:
    """The transport and device that `auto` picks where these are the findings."""
    findings = list(findings)
    status = {finding.name: finding.status for finding in findings}
    blockers = [name for name in ESSENTIAL if status[name] == "missing"]
    if blockers:
        reason = f"moeshm cannot run without {', '.join(blockers)}"
        return Auto(None, None, reason, reason)
    # Not "cuda:0-cuda:1", which is a way between two.
    gpus = [name for name in status if re.fullmatch(r"(cuda|hip):\d+", name)]
    device = gpus[0] if gpus else "cpu"
    device_reason = "the first GPU that CuPy sees" if gpus else "CuPy sees no GPU"
    lacking = [name for name in SHARED_NEEDS if status[name] != "ok"]
    if lacking:
        reason = f"shared needs {', '.join(lacking)} to be ok"
        return Auto("stream", device, reason, device_reason)
    return Auto("shared", device, f"{', '.join(SHARED_NEEDS)} are ok", device_reason)
