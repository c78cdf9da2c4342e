"""What clients may take of a worker: how many connections, handshakes and bytes, and whose."""

from __future__ import annotations

import bisect
import contextlib
import resource
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable

from . import process
from .access import Peer, user_name
from .errors import HandshakeRefused
from .settings import Settings

#: Of one session: its socket, its client's pidfd, two rings, a stream, a slab while it is sent.
_FDS_PER_SESSION = 6
#: Of a worker without sessions; a GPU's driver opens many.
_OTHER_FDS = 256


class Busy(HandshakeRefused):
    """There is no room now, and may be soon: the client is told to ask again."""


class Admission:
    """A connection that was let in, until `end`; of what it takes, the bytes are counted here."""

    def __init__(self, book: Admissions, sock: socket.socket, peer: Peer) -> None:
        self._book = book
        self._socket = sock
        self.peer = peer
        self.is_shaking = True
        #: It had to make room for the handshake of another client.
        self.is_evicted = False
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
        """The handshake is over."""
        self.is_shaking = False

    def evict(self) -> None:
        """End the handshake; what its thread waits for does not come any more. It tells the client
        `why_evicted`."""
        self.is_evicted = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def why_evicted(self) -> Busy:
        """For its client."""
        most = self._book.settings.max_handshakes
        return Busy(
            f"the handshake of process {self.peer.pid} made room for another client's: "
            f"MOESHM_MAX_HANDSHAKES={most} of the worker allows no more at a time"
        )

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
        self._max_bytes = settings.max_bytes or process.available_memory() // 2
        self._lock = threading.Lock()
        #: In the order in which they came.
        self._here: dict[Admission, None] = {}
        #: How often each limit was met, by the setting.
        self.refused: Counter[str] = Counter()

    def admit(self, sock: socket.socket, peer: Peer) -> Admission:
        """Let a connection in. HandshakeRefused names the limit that is met; Busy where there will
        be room soon."""
        limits = self.settings
        with self._lock:
            here = list(self._here)
            if len(here) >= limits.max_sessions:
                is_busy = any(each.has_left() for each in here)
                self._refuse("max_sessions", len(here), "", is_busy)
            of_user = [each for each in here if each.peer.uid == peer.uid]
            self._check("max_sessions_per_user", of_user, f" of user {user_name(peer.uid)}")
            # 0 is any process of another container.
            of_process = [each for each in of_user if peer.pid and each.peer.pid == peer.pid]
            self._check("max_sessions_per_process", of_process, f" of process {peer.pid}")
            shaking = [each for each in here if each.is_shaking and not each.is_evicted]
            if len(shaking) >= limits.max_handshakes:
                self._make_room(shaking, peer)
            admission = Admission(self, sock, peer)
            self._here[admission] = None
            return admission

    def take_bytes(self, admission: Admission, n_bytes: int) -> None:
        """A session is about to take these; HandshakeRefused when all have too many then."""
        with self._lock:
            taken = sum(each.n_bytes for each in self._here if each is not admission)
            if taken + n_bytes > self._max_bytes:
                self.refused["max_bytes"] += 1
                raise HandshakeRefused(
                    f"the worker's sessions take {taken} bytes, and this one would take {n_bytes}; "
                    f"{self._max_bytes} may be taken: close others, ask for a smaller "
                    "batch_capacity, or start the worker with more MOESHM_MAX_BYTES"
                )
            admission.n_bytes = n_bytes

    def count(self, name: str) -> None:
        """A limit was met."""
        with self._lock:
            self.refused[name] += 1

    def end(self, admission: Admission) -> None:
        """As `Admission.end`."""
        with self._lock:
            self._here.pop(admission, None)

    def _check(self, name: str, theirs: list[Admission], whose: str) -> None:
        most = getattr(self.settings, name)
        if len(theirs) >= most:
            n_live = sum(not each.has_left() for each in theirs)
            if n_live >= most:
                self._refuse(name, n_live, whose, is_busy=False)

    def _make_room(self, shaking: list[Admission], peer: Peer) -> None:
        """End the oldest handshake of whichever process has most, so that one that has many keeps
        no other out; Busy where the newcomer's own has as many."""
        counts = Counter(each.peer.pid for each in shaking)
        pid, most = counts.most_common(1)[0]
        if most <= counts[peer.pid] + 1:
            self._refuse("max_handshakes", len(shaking), " at their handshake", is_busy=True)
        self.refused["max_handshakes"] += 1
        next(each for each in shaking if each.peer.pid == pid).evict()

    def _refuse(self, name: str, count: int, whose: str, is_busy: bool) -> None:
        self.refused[name] += 1
        kind = Busy if is_busy else HandshakeRefused
        raise kind(
            f"{count} connections{whose}; MOESHM_{name.upper()}={getattr(self.settings, name)} of "
            "the worker allows no more: close some, or start it with more"
        )


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
