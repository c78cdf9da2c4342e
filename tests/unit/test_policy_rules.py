"""What the settings leave open: transports, dtypes, slices; and how a bad one is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from moeshm.dtypes import DType
from moeshm.errors import SettingError
from moeshm.policy import Choice, Chooser, Path, Policy
from moeshm.policy.rules import SLICES, bucket_of, candidates, slices, usable_paths, wire_dtypes
from moeshm.settings import Settings

from .policy_simulator import PATHS, SHAPE, make_work

F32, F16, BF16 = DType.F32, DType.F16, DType.BF16


def all_of(policy: Policy, n_tokens: int, dtype: DType = F32) -> list[Choice]:
    return candidates(policy, usable_paths(policy, PATHS), dtype, n_tokens)


def test_the_policy_is_what_the_settings_say() -> None:
    settings = Settings(
        mode="stream", transport="shared", wire_dtype="f16", batch_capacity=7, tolerance=0.5
    )
    policy = Policy.from_settings(settings)
    assert msgspec.structs.asdict(policy) == {
        name: getattr(settings, name) for name in Policy.__struct_fields__
    }
    assert Policy.from_settings(Settings()) == Policy()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mode", "fast", "mode='fast'; choose auto, batched, stream"),
        ("transport", "tcp", "transport='tcp'; choose auto, stream, shared"),
        ("wire_dtype", "f64", "wire_dtype='f64'; choose auto, f32, f16, bf16"),
        ("batch_capacity", 0, r"batch_capacity=0; it must lie in 1\.\.4096"),
        ("batch_capacity", 5000, r"it must lie in 1\.\.4096"),
        ("tolerance", -1.0, r"tolerance=-1\.0; it must lie in 0\.\.1"),
        ("tolerance", float("nan"), r"it must lie in 0\.\.1"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field: str, value: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Policy(**{field: value})


def test_a_transport_that_the_worker_lacks_is_refused_by_name() -> None:
    stream = {"stream": PATHS["stream"]}
    with pytest.raises(SettingError, match="transport='shared', but this worker offers stream;"):
        Chooser(Policy(transport="shared"), stream)
    with pytest.raises(SettingError, match="offers none"):
        Chooser(Policy(), {})
    Chooser(Policy(transport="stream"), stream)


@pytest.mark.parametrize("n_tokens", [1, 3, 600])
@pytest.mark.parametrize(("mode", "slice_tokens"), [("stream", 4), ("batched", 300)])
@pytest.mark.parametrize("transport", ["stream", "shared"])
@pytest.mark.parametrize("wire", list(DType))
def test_forced_settings_leave_one_candidate(
    n_tokens: int, mode: str, slice_tokens: int, transport: str, wire: DType
) -> None:
    policy = Policy(mode=mode, transport=transport, wire_dtype=str(wire), batch_capacity=300)
    only = Choice(transport, wire, slice_tokens)
    for dtype in DType:
        assert all_of(policy, n_tokens, dtype) == [only]
    chooser = Chooser(policy, PATHS)
    work = make_work(n_tokens)
    for _ in range(40):
        assert chooser.choose(SHAPE, work) == only
    (verdict,) = chooser.explain(SHAPE, work)
    assert verdict.is_chosen
    assert verdict.why == "the settings leave no other"


@pytest.mark.parametrize(
    ("n_tokens", "expected"),
    [
        (1, [1024]),
        (4, [1024]),
        (5, [4, 1024]),
        (16, [4, 1024]),
        (512, [4, 16, 64, 256, 1024]),
        (4000, [4, 16, 64, 256, 1024]),
    ],
)
def test_slices_that_hold_all_tokens_are_one_candidate(n_tokens: int, expected: list[int]) -> None:
    assert slices(Policy(), PATHS["shared"], n_tokens) == expected


def test_all_work_of_a_bucket_has_the_same_candidates() -> None:
    for n_tokens in range(2, 1025):
        if bucket_of(n_tokens) == bucket_of(n_tokens - 1):
            assert all_of(Policy(), n_tokens) == all_of(Policy(), n_tokens - 1)
    assert [bucket_of(n) for n in (1, 2, 4, 5, 16, 17, 64, 65, 4096)] == [0, 1, 1, 2, 2, 3, 3, 4, 6]


@pytest.mark.parametrize("mode", ["auto", "batched", "stream"])
@pytest.mark.parametrize("max_tokens", [1, 3, 64, 100, 4096])
@pytest.mark.parametrize("capacity", [1, 50, 4096])
def test_no_slice_exceeds_what_the_worker_takes(mode: str, max_tokens: int, capacity: int) -> None:
    policy = Policy(mode=mode, batch_capacity=capacity)
    for n_tokens in (1, 70, 5000):
        found = slices(policy, Path("shared", max_tokens, 1 << 20), n_tokens)
        assert found
        assert max(found) <= min(max_tokens, capacity)
        assert len(set(found)) == len(found)
        assert set(found) <= {*SLICES, min(max_tokens, capacity)}


@pytest.mark.parametrize(
    ("dtype", "tolerance", "expected"),
    [
        (F32, 0.0, [F32]),
        (F32, 2**-9, [F32]),
        (F32, 2**-8, [F32, BF16]),
        (F32, 1.0, [F32, BF16]),
        (F16, 1.0, [F16]),
        (BF16, 1.0, [BF16]),
    ],
)
def test_auto_rounds_only_as_far_as_tolerated(
    dtype: DType, tolerance: float, expected: list[DType]
) -> None:
    path = Path("shared", 64, 1 << 20)
    assert wire_dtypes(Policy(tolerance=tolerance), path, dtype) == expected
