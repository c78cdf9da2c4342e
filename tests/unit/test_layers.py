"""What a layer may look like, and the ranges that options use."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from moeshm.dtypes import DType
from moeshm.layers import Activation, LayerInfo, format_ranges, parse_ranges

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "top_k": 2}


def test_defaults_and_summary() -> None:
    info = LayerInfo(**SIZES, experts=(0, 3))
    assert info.activation is Activation.SWIGLU
    assert info.weight_dtype is DType.F32
    assert not info.holds_all_experts
    assert info.summary() == {
        "hidden_size": 8,
        "intermediate_size": 4,
        "num_experts": 6,
        "local_experts": 2,
        "top_k": 2,
        "activation": "swiglu",
        "weight_dtype": "f32",
    }


def test_holds_all_experts_only_in_the_models_order() -> None:
    assert LayerInfo(**SIZES, experts=(0, 1, 2, 3, 4, 5)).holds_all_experts
    assert not LayerInfo(**SIZES, experts=(1, 0, 2, 3, 4, 5)).holds_all_experts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0; it must be at least 1"),
        ({"intermediate_size": -1}, "intermediate_size=-1"),
        ({"top_k": 7}, "top_k=7 exceeds num_experts=6"),
        ({"experts": (1, 1)}, "lists an id twice"),
        ({"experts": (0, 6)}, r"must lie in 0\.\.5"),
        ({"experts": (-1,)}, r"must lie in 0\.\.5"),
    ],
)
def test_layers_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerInfo(**{**SIZES, "experts": (0,), **change})


def test_a_layer_survives_the_wire() -> None:
    info = LayerInfo(
        **SIZES,
        experts=(5, 2),
        activation=Activation.SWIGLU_CLAMPED,
        weight_dtype=DType.BF16,
        activation_limit=5.0,
    )
    assert msgspec.json.decode(msgspec.json.encode(info), type=LayerInfo) == info


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", (3,)),
        ("0-3,7", (0, 1, 2, 3, 7)),
        ("7, 1-2 ,2", (7, 1, 2)),
        ("4-4", (4,)),
    ],
)
def test_ranges(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_ranges(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1-", "-", "1,,2", "1-2-3", "3.5"])
def test_ranges_that_do_not_parse(text: str) -> None:
    with pytest.raises(ValueError, match="no number or range like 0-23"):
        parse_ranges(text)


def test_ranges_that_count_down() -> None:
    with pytest.raises(ValueError, match="'7-3' in '0,7-3' counts down; write 3-7"):
        parse_ranges("0,7-3")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((4,), "4"), ((1, 2, 3, 7), "1-3, 7"), ((0, 1, 9, 10), "0-1, 9-10")],
)
def test_ranges_are_written_as_they_are_read(numbers: tuple[int, ...], text: str) -> None:
    assert format_ranges(numbers) == text
    if numbers:
        assert parse_ranges(text) == numbers
