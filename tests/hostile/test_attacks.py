"""Every attack of attacks/ is refused in the way it says, and nobody else is hurt by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from moeshm.errors import CallError, HandshakeRefused, WorkerDied
from tests.hostile import calls
from tests.hostile.attack import Attack, Case, Refusal, Variant, cases, load_all
from tests.hostile.attacker import Attacker, attacking
from tests.hostile.conftest import Victim, unhurt

_STATUS = {"InvalidCall": calls.INVALID, "WorkerFailed": calls.FAILED}
_STATUS["DeadlineExceeded"] = calls.EXPIRED


@pytest.mark.parametrize("case", cases("client"), ids=str)
def test_a_client_that_attacks_is_refused_and_hurts_nobody(
    case: Case, victims: Mapping[str, Victim]
) -> None:
    attack, variant = case.attack, case.attack.variants[case.variant]
    victim = victims[case.victim]
    with unhurt(victim, case.transport):
        if hasattr(attack.module, "scene"):
            attack.module.scene(victim, case.transport, variant.what, attack.refusal_of(variant))
            return
        _attack(attack, variant, victim, case.transport)


def _attack(attack: Attack, variant: Variant, victim: Victim, transport: str) -> None:
    refusal = attack.refusal_of(variant)
    with attacking(
        victim.address, transport if attack.has_session else None, attack.slab
    ) as attacker:
        attacker.transport_wish = transport
        attacker.fds_are_refused = victim.refuses_fds
        for _ in range(attack.n_served):
            calls.assert_served(attacker)
        attack.module.attack(attacker, variant.what)
        _expect(refusal, attacker, victim)
    if refusal.error not in (HandshakeRefused, WorkerDied):
        victim.expect_log(f"session ended after {attacker.n_served} calls")


def _expect(refusal: Refusal, attacker: Attacker, victim: Victim) -> None:
    """The answer is the one that was announced, and so is the line in the log."""
    if refusal.error is HandshakeRefused:
        kind, reason = attacker.farewell()
        assert kind == "refusal"
        assert refusal.says in reason
        assert refusal.says in victim.expect_log(refusal.log)
    elif refusal.error is WorkerDied:
        kind, reason = attacker.farewell()
        assert kind == "goodbye"
        assert refusal.says in reason
        line = victim.expect_log(f"session ended after {attacker.n_served} calls")
        assert refusal.says in line
        assert refusal.log in line
    elif refusal.error is not None:
        assert issubclass(refusal.error, CallError)
        status, text = calls.read_error(attacker.receive())
        assert status == _STATUS[refusal.error.__name__]
        assert refusal.says in text
        if attacker.has_slab:
            calls.wait_until_done(attacker)
            assert calls.read_flag(attacker, calls.REFUSED) == calls.TOLD
            calls.set_flag(attacker, calls.REFUSED, 0)
        calls.assert_served(attacker)
    else:
        calls.assert_served(attacker)


@pytest.mark.parametrize("case", cases("worker"), ids=str)
def test_a_worker_that_attacks_gets_no_wrong_result_believed(case: Case, tmp_path: Path) -> None:
    variant = case.attack.variants[case.variant]
    refusal = case.attack.refusal_of(variant)
    case.attack.module.scene(tmp_path, case.transport, variant.what, refusal)


@pytest.mark.usefixtures("bystander")
def test_a_call_that_is_refused_leaves_a_line_in_the_log(victim: Victim, transport: str) -> None:
    with attacking(victim.address, transport) as attacker:
        attacker.send(calls.call(layer=99))
        assert "layer 99" in calls.read_error(attacker.receive())[1]
    assert "layer 99" in victim.expect_log("session ended after 0 calls")


@pytest.mark.parametrize("slab", ["", "pinned"])
@pytest.mark.usefixtures("bystander")
def test_what_the_attacker_speaks_is_right(victim: Victim, transport: str, slab: str) -> None:
    """Or its attacks would be refused for something else."""
    with attacking(victim.address, transport, slab) as attacker:
        for _ in range(3):
            calls.assert_served(attacker)
    victim.expect_log("session ended after 3 calls")


@pytest.mark.parametrize("attack", load_all(), ids=lambda attack: attack.name)
def test_an_attack_says_what_it_is(attack: Attack) -> None:
    first = attack.what
    assert "\n" not in first, "one line says what the attacker does"
    assert first.endswith(".")
    assert attack.why, "then why it would hurt"
    assert hasattr(attack.module, "attack") != hasattr(attack.module, "scene")
    assert attack.side in ("client", "worker")
    if attack.refusal.error in (HandshakeRefused, WorkerDied) and attack.side == "client":
        assert attack.refusal.log, "what the log says"
