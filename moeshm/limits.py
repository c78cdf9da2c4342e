"""What clients may take of a worker: how many connections, handshakes and bytes, and whose."""

from __future__ import annotations

import bisect
import contextlib
import logging
import resource
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable

from . import process
from .access import Peer
from .errors import HandshakeRefused
from .settings import Settings

_log = logging.getLogger(__name__)

#: Of one session: its socket, its client's pidfd, two rings, a stream, a slab while it is sent.
_FDS_PER_SESSION = 6
#: Of a worker without sessions; a GPU's driver opens many, and some are being refused.
_OTHER_FDS = 512
#: Sessions may take so many, however little memory is free.
_LEAST_BYTES = 64 << 20
#: Of the bytes of all sessions, those of one user and of one process.
_USER_SHARE, _PROCESS_SHARE = 3 / 4, 1 / 2
#: A handshake that goes on for longer makes room where all have as many. Most take a few ms.
_SLOW_HANDSHAKE_S = 0.1


class Busy(HandshakeRefused):
    """There is no room now, and may be soon: the client is told to ask again."""


class Admission:
    """A connection that was let in, until `end`; of what it takes, the bytes are counted here."""

    def __init__(self, book: Admissions, sock: socket.socket, peer: Peer) -> None:
        self._book = book
        self._socket = sock
        self.peer = peer
        #: Of what is counted for its process; one that has no number here cannot be told from
        #: others, and is counted by itself.
        self.process: Hashable = (peer.uid, peer.pid) if peer.pid else object()
        self.began_at = time.monotonic()
        self.is_shaking = True
        #: Why its handshake had to end; None where it did not.
        self.why_evicted: Busy | None = None
        self.n_bytes = 0
        #: That it is offered calls of fewer tokens than it asked for; empty if it is not.
        self.cut = ""

    def take_bytes(self, max_tokens: int, bytes_for: Callable[[int], int]) -> int:
        """Most tokens in a call of its session, up to `max_tokens`, for which that may take the
        bytes, which it then takes. HandshakeRefused: there are none, or all sessions have too many.
        """
        name, most = "MOESHM_MAX_BYTES_PER_SESSION", self._book.settings.max_bytes_per_session
        n_tokens = max_tokens
        if bytes_for(max_tokens) > most:
            n_tokens = bisect.bisect_right(range(1, max_tokens), most, key=bytes_for)
            self._book.count("max_bytes_per_session")
            if not n_tokens:
                raise HandshakeRefused(
                    f"a session takes at least {bytes_for(1)} bytes, and {name}={most} of the "
                    "worker allows no more: start it with more"
                )
            self.cut = f"{max_tokens} were wanted: {name}={most}"
        self._book.take_bytes(self, bytes_for(n_tokens))
        return n_tokens

    def has_shaken_hands(self) -> None:
        """The handshake is over, and only the welcome is to be sent. Busy: it was evicted."""
        self._book.has_shaken_hands(self)

    def evict(self, why: Busy) -> None:
        """End the handshake; what its thread waits for does not come any more. That tells the
        client why."""
        self.why_evicted = why
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def has_left(self) -> bool:
        """True when its client hung up, and only the worker has to end it still."""
        fd = self._socket.fileno()
        if fd < 0:
            return True
        poll = select.poll()
        poll.register(fd, 0)
        return bool(poll.poll(0))

    def end(self) -> None:
        """Nothing of it is left; again does nothing."""
        self._book.end(self)


class Admissions:
    """Lets connections in, within the settings MOESHM_MAX_*.

    `admit` is called by one thread, the rest by any.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._max_bytes = settings.max_bytes or _bytes_to_give()
        self._lock = threading.Lock()
        #: In the order in which they came.
        self._here: dict[Admission, None] = {}
        #: How often each limit was met, by the setting.
        self.refused: Counter[str] = Counter()

    def admit(self, sock: socket.socket, peer: Peer) -> Admission:
        """Let a connection in. HandshakeRefused names the limit that is met; Busy where there will
        be room soon."""
        newcomer = Admission(self, sock, peer)
        with self._lock:
            here = list(self._here)
            self._check("max_sessions", here, "")
            of_user = [each for each in here if each.peer.uid == peer.uid]
            # By its number: to ask for its name may take a while.
            self._check("max_sessions_per_user", of_user, f" of user {peer.uid}")
            of_process = [each for each in of_user if each.process == newcomer.process]
            self._check("max_sessions_per_process", of_process, f" of process {peer.pid}")
            shaking = [each for each in here if each.is_shaking and not each.why_evicted]
            if len(shaking) >= self.settings.max_handshakes:
                self._make_room(shaking, newcomer)
            self._here[newcomer] = None
            return newcomer

    def take_bytes(self, admission: Admission, n_bytes: int) -> None:
        """A session is about to take these; HandshakeRefused when all, or those of its user or
        process, have too many then."""
        with self._lock:
            others = [each for each in self._here if each is not admission]
            of_user = [each for each in others if each.peer.uid == admission.peer.uid]
            of_process = [each for each in of_user if each.process == admission.process]
            for whose, theirs, share in (
                ("", others, 1.0),
                (" of one user", of_user, _USER_SHARE),
                (" of one process", of_process, _PROCESS_SHARE),
            ):
                taken, most = sum(each.n_bytes for each in theirs), int(share * self._max_bytes)
                # One session each may have, if there is room.
                if taken + n_bytes <= most or (whose and not taken):
                    continue
                self.refused["max_bytes"] += 1
                raise _kind_for(theirs)(
                    f"the worker's sessions{whose} take {taken} bytes, and this one would take "
                    f"{n_bytes}; {most} may be taken: close others, ask for a smaller "
                    "batch_capacity, or start the worker with more MOESHM_MAX_BYTES"
                )
            admission.n_bytes = n_bytes

    def has_shaken_hands(self, admission: Admission) -> None:
        """As `Admission.has_shaken_hands`."""
        with self._lock:
            if admission.why_evicted is not None:
                raise admission.why_evicted
            admission.is_shaking = False

    def evict_all(self, why: Busy) -> None:
        """End every handshake that is not over."""
        with self._lock:
            for each in self._here:
                if each.is_shaking and each.why_evicted is None:
                    each.evict(why)

    def count(self, name: str) -> None:
        """A limit was met."""
        with self._lock:
            self.refused[name] += 1

    def end(self, admission: Admission) -> None:
        """As `Admission.end`."""
        with self._lock:
            self._here.pop(admission, None)

    def _check(self, name: str, theirs: list[Admission], whose: str) -> None:
        if len(theirs) >= getattr(self.settings, name):
            self._refuse(name, len(theirs), whose, _kind_for(theirs))

    def _make_room(self, shaking: list[Admission], newcomer: Admission) -> None:
        """End the oldest handshake of whichever user has most, and of that user's, of whichever
        process has, so that who has many keeps no other out. Where all have as many as the
        newcomer's, the oldest ends if it is slow; else Busy."""
        theirs, is_even = shaking, True
        for whose in (_user_of, _process_of):
            counts = Counter(map(whose, theirs))
            who, most = counts.most_common(1)[0]
            if most > counts[whose(newcomer)] + 1:
                is_even = False
                theirs = [each for each in theirs if whose(each) == who]
        oldest = theirs[0]
        if is_even and time.monotonic() - oldest.began_at < _SLOW_HANDSHAKE_S:
            self._refuse("max_handshakes", len(shaking), " at their handshake", Busy)
        self.refused["max_handshakes"] += 1
        oldest.evict(
            Busy(
                f"the handshake of process {oldest.peer.pid} made room for another client's: "
                f"MOESHM_MAX_HANDSHAKES={self.settings.max_handshakes} of the worker allows no "
                "more at a time"
            )
        )

    def _refuse(self, name: str, count: int, whose: str, kind: type[HandshakeRefused]) -> None:
        self.refused[name] += 1
        raise kind(
            f"{count} connections{whose}; MOESHM_{name.upper()}={getattr(self.settings, name)} of "
            "the worker allows no more: close some, or start it with more"
        )


def _user_of(admission: Admission) -> Hashable:
    return admission.peer.uid


def _process_of(admission: Admission) -> Hashable:
    return admission.process


def _kind_for(theirs: Iterable[Admission]) -> type[HandshakeRefused]:
    """How to refuse one more: there is room soon where one is about to end."""
    return Busy if any(each.has_left() for each in theirs) else HandshakeRefused


def _bytes_to_give() -> int:
    """Of all sessions: half of what is free now, but not so few that nobody is served."""
    half = process.available_memory() // 2
    if half < _LEAST_BYTES:
        _log.warning(
            "%d bytes of memory are free; sessions may take %d all the same, or what "
            "MOESHM_MAX_BYTES says",
            2 * half,
            _LEAST_BYTES,
        )
    return max(half, _LEAST_BYTES)


def allow_fds(settings: Settings) -> str:
    """Let this process open as many files as its sessions may need; what falls short, or ""."""
    wanted = _OTHER_FDS + _FDS_PER_SESSION * settings.max_sessions
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return ""
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # what runs it may not allow that
        hard = soft
    else:
        if allowed >= wanted:
            return ""
    return (
        f"{hard} open files are allowed, and MOESHM_MAX_SESSIONS={settings.max_sessions} may need "
        f"{wanted}; raise the limit (systemd: LimitNOFILE=), or lower the setting"
    )
