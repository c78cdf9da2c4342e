"""`moeshm doctor` on this machine's GPUs: what calls there need is found to work."""

from __future__ import annotations

import warnings

import pytest

from moeshm.diagnosis import gpus
from moeshm.diagnosis.finding import Finding

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found() -> dict[str, Finding]:
    """By name, what is found of the GPUs and of the ways between them."""
    with warnings.catch_warnings():
        # CuPy may warn of what is installed beside it.
        warnings.simplefilter("ignore")
        return {finding.name: finding for finding in gpus.check_gpus()}


def test_every_gpu_can_use_slabs(found: dict[str, Finding]) -> None:
    names = [name for name in found if "-" not in name]
    assert names
    for name in names:
        for way in (f"{name}-host", f"{name}-{name}"):
            assert found[way].status == "ok", found[way]


def test_two_gpus_work_or_lack_peer_access(found: dict[str, Finding]) -> None:
    pairs = [name.split("-") for name in found if "-" in name and not name.endswith("-host")]
    between = [found[f"{one}-{other}"] for one, other in pairs if one != other]
    if not between:
        pytest.skip("one GPU")
    for finding in between:
        assert finding.status == "ok" or "has no peer access" in finding.value, finding
