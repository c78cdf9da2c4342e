"""The ring's protocol in SPIN: sound as it is, and unsound with any one mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import orders, page, source, spin, steps
from .cases import BROKEN, SOUND, Case

needs_spin = pytest.mark.skipif(spin.why_none() is not None, reason=str(spin.why_none()))


def _runs(cases: list[Case]) -> list[tuple[Case, str]]:
    return [(case, memory) for case in cases for memory in case.memories]


def _name(value: object) -> str:
    return str(value)


@needs_spin
@pytest.mark.parametrize(("case", "memory"), _runs(SOUND), ids=_name)
def test_every_execution_is_right(case: Case, memory: str, tmp_path: Path) -> None:
    verdict = spin.check("ring.pml", [memory, *case.defines], tmp_path, progress=case.progress)
    assert verdict.error is None
    assert verdict.states > 1000
    assert case.producer <= verdict.reached["Producer"]
    assert case.consumer <= verdict.reached["Consumer"]


@needs_spin
@pytest.mark.parametrize(("case", "memory"), _runs(BROKEN), ids=_name)
def test_a_mistake_is_found(case: Case, memory: str, tmp_path: Path) -> None:
    """Or is none where the memory is as orderly as x86's."""
    verdict = spin.check("ring.pml", [memory, *case.defines], tmp_path, progress=case.progress)
    if memory in case.errors:
        assert verdict.error is not None
        assert verdict.error.startswith(case.errors[memory])
    else:
        assert verdict.error is None


def test_every_mistake_of_the_model_is_a_case() -> None:
    text = "".join(path.read_text() for path in spin.FOLDER.glob("*.pml"))
    named = {define for case in BROKEN for define in case.defines if define.startswith("BROKEN_")}
    assert named == set(steps.MISTAKE.findall(text))


# --- the model and the code --------------------------------------------------------------


def test_the_page_names_the_lines() -> None:
    found, written = page.render().splitlines(), page.written().splitlines()
    moved = [line for line in found if line not in written]
    assert found == written, "run `make model-page`; docs/model.md should say\n" + "\n".join(moved)


def test_the_table_has_every_step_of_the_model() -> None:
    assert sorted(steps.tags()) == [step.number for step in steps.STEPS]


def test_every_atomic_of_the_ring_is_a_step_or_left_out() -> None:
    assert steps.unaccounted() == []


def test_each_step_calls_what_the_model_has_for_it() -> None:
    modelled = orders.operations()
    for step in steps.STEPS:
        operation = modelled.get(step.number)
        meant = "" if operation is None else orders.MEANT[operation].function
        assert step.operation() == meant, f"step {step.number}, {step.what}"


def test_each_operation_has_the_memory_order_that_the_model_gives_it() -> None:
    meant = {each.function: each.order for each in orders.MEANT.values() if each.function}
    assert orders.orders() == {**meant, **orders.OF_OTHERS}


def test_no_atomic_of_the_ring_is_written_past_atomics_h() -> None:
    found = [
        path.name for path in source.ROOT.glob("moeshm/_*.pyx") if "__atomic" in path.read_text()
    ]
    assert found == []


def test_what_is_copied_past_the_caches_is_fenced_before_it_is_published() -> None:
    """Such stores are not ordered by a release, on x86 either."""
    copy = source.code_of(source.ATOMICS).partition("moeshm_copy(")[2].partition("#endif")[0]
    assert copy.count("_mm_stream_si128(") == 4
    after = copy.rpartition("_mm_stream_si128(")[2].partition("return;")
    assert after[1]
    assert "_mm_sfence();" in after[0]
