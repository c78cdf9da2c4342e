"""The life of a worker process: its socket, its sessions' threads, signals, readiness, the end."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from . import access, process, protocol, session, settings
from .backends import Backend, MemoryUser
from .errors import DeviceLost, HandshakeRefused, MoeshmError
from .holdings import Holdings, Load
from .limits import Admission, Admissions, Busy
from .listening import Listener
from .logs import SUMMARY_S, PeerLog, limited
from .refusals import Refusals
from .session import ControlSocket
from .signals import signals_as_bytes
from .slab_server import SlabServer
from .transport import Transport
from .turns import Turns
from .views import SessionViews
from .worker import SessionServer

_log = logging.getLogger(__name__)
#: Of connections that got nowhere.
_lost = limited(f"{__name__}.lost")

#: How long a client may take for its part of the handshake.
HANDSHAKE_TIMEOUT_S = 5.0
#: How long sessions may take to finish what they have, once the worker drains.
DRAIN_TIMEOUT_S = 30.0
#: How long, then, clients that were refused may take to be told.
_REFUSALS_S = 1.0
#: A connection that was not accepted stays in the queue, and would be tried all the time.
_ACCEPT_PAUSE_S = 0.25
#: A call may take this share of the memory that is free when the worker starts.
_MEMORY_SHARE = 1 / 16


class Daemon:
    """Serves a backend at `unix:PATH` until SIGTERM or SIGINT, or until `lifeline` ends.

    `lifeline`: a pidfd of whoever started the worker; -1 for none. `load`: reads the experts that
    clients ask for beyond the backend's; None for none. `group`: the number of one whose members
    are served besides this process's user and root. What clients may take, MOESHM_MAX_* say.
    AddressInUse: a live worker listens there, or another user has power over the path.
    SettingError: `listen`.
    """

    def __init__(
        self,
        backend: Backend,
        listen: str,
        lifeline: int = -1,
        load: Load | None = None,
        group: int | None = None,
    ) -> None:
        path = Path(session.parse_address(listen))
        self._holdings = Holdings(backend, load)
        self._group = group
        self._admissions = Admissions(settings.current())
        self._peers = PeerLog(_log)
        self._refusals = Refusals()
        self._lifeline = lifeline
        self._turns = Turns()
        self._draining = threading.Event()
        self._threads: set[threading.Thread] = set()
        self._device_lost: DeviceLost | None = None
        self._max_tokens = _max_tokens(backend)
        self._listener = Listener(path, group)

    def run(self) -> None:
        """Serve; returns once everything that was begun is finished.

        DeviceLost, then as well: the backend's device computes no call any more.
        """
        try:
            losses, self._loss_writer = socket.socketpair()
            with (
                losses,
                self._loss_writer,
                signals_as_bytes() as signals,
                selectors.DefaultSelector() as selector,
            ):
                selector.register(self._listener.socket, selectors.EVENT_READ)
                selector.register(signals, selectors.EVENT_READ)
                selector.register(losses, selectors.EVENT_READ)
                if self._lifeline >= 0:
                    selector.register(self._lifeline, selectors.EVENT_READ)
                notify_systemd("READY=1")
                _log.info("listening at unix:%s", self._listener.path)
                self._accept_until_told(selector, signals, losses)
        finally:
            notify_systemd("STOPPING=1")
            self._listener.close()
            self._drain()
            self._summarise()
        if self._device_lost is not None:
            raise self._device_lost

    def _accept_until_told(
        self, selector: selectors.BaseSelector, signals: socket.socket, losses: socket.socket
    ) -> None:
        while True:
            ready = selector.select(SUMMARY_S)
            self._peers.summarise()
            for key, _ in ready:
                if key.fileobj is self._listener.socket:
                    self._accept()
                elif key.fileobj is signals:
                    name = signal.Signals(signals.recv(1)[0]).name
                    _log.info("%s: draining", name)
                    return
                elif key.fileobj is losses:
                    return
                else:
                    _log.info("whoever started this worker is gone: draining")
                    return

    def _accept(self) -> None:
        if not self._refusals.has_room():
            _lost.warning("clients that were refused hold their connections: no more are accepted")
            self._draining.wait(_ACCEPT_PAUSE_S)
            return
        try:
            sock, _ = self._listener.socket.accept()
        except OSError as error:
            # Out of fds, or the client is gone already.
            _lost.warning("a connection could not be accepted: %s", error)
            self._draining.wait(_ACCEPT_PAUSE_S)
            return
        peer = access.peer_of(sock)
        try:
            access.check_client(sock, peer, self._group)
            admission = self._admissions.admit(sock, peer)
        except HandshakeRefused as error:
            self._refuse(sock, peer, error)
            return
        thread = threading.Thread(
            target=self._serve, args=(sock, admission), name="moeshm-session", daemon=True
        )
        self._threads = {each for each in self._threads if each.is_alive()}
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or no memory for one's stack
            admission.end()
            why = f"the worker has no thread for another session: {error}"
            self._refuse(sock, peer, Busy(why))
            return
        self._threads.add(thread)

    def _refuse(self, sock: socket.socket, peer: access.Peer, error: HandshakeRefused) -> None:
        # Not in this thread, which all clients need.
        self._refusals.put(
            sock,
            error,
            lambda: self._peers.log(peer, logging.WARNING, f"got no session: {error}"),
        )

    def _serve(self, sock: socket.socket, admission: Admission) -> None:
        try:
            with contextlib.closing(ControlSocket(sock, is_worker=True)) as control:
                if control.peer_pidfd < 0 and process.is_alive(admission.peer.pid):
                    why = "its death is not watched for, only its hang-up: no pidfd could be opened"
                    self._peers.log(admission.peer, logging.WARNING, why)
                level, outcome = self._serve_client(control, admission)
        finally:
            admission.end()
        # Only now, so that whoever reads it can rely on its being freed.
        self._peers.log(admission.peer, level, outcome)

    def _serve_client(self, control: ControlSocket, admission: Admission) -> tuple[int, str]:
        """Until the session ends; how serious that is, and how it ended."""
        with (
            SessionViews(self._holdings) as views,
            contextlib.closing(SlabServer(views.backend)) as slab,
        ):
            try:
                opened = session.accept(
                    control,
                    views.layers,
                    views.backend.name,
                    self._max_tokens,
                    HANDSHAKE_TIMEOUT_S,
                    slab.offer,
                    admission,
                )
            except (MoeshmError, OSError) as error:
                why: Exception = error
                if admission.why_evicted is not None and error is not admission.why_evicted:
                    why = admission.why_evicted
                    control.refuse(why)
                return logging.WARNING, f"got no session: {why}"
            # Until before the memory is unmapped, whatever ends the session.
            with opened, _used_memory(views.backend, opened.transport) as direct_bytes:
                self._log_session(opened, admission, slab, direct_bytes)
                return logging.INFO, self._serve_session(opened, views, slab)

    def _log_session(
        self, opened: session.Session, admission: Admission, slab: SlabServer, direct_bytes: int
    ) -> None:
        welcome = opened.welcome
        parts = [
            f"session over {welcome.transport}, up to {welcome.max_tokens} tokens a call",
            f" ({admission.cut})" if admission.cut else "",
            f" ({welcome.stepped_down})" if welcome.stepped_down else "",
            f", {direct_bytes / 2**20:.1f} MiB registered for the device" if direct_bytes else "",
            f", {slab.summary}" if slab.summary else "",
            f" ({welcome.slab_refused})" if welcome.slab_refused else "",
        ]
        self._peers.log(admission.peer, logging.INFO, "".join(parts))

    def _serve_session(self, opened: session.Session, views: SessionViews, slab: SlabServer) -> str:
        server = SessionServer(opened, views, self._turns, self._draining, slab, self._peers)
        why = server.serve()
        slab.wait_until_taken(opened.peer_is_gone)
        if server.device_lost is not None:
            self._device_lost = server.device_lost
            # It is closed when the worker drains already.
            with contextlib.suppress(OSError):
                self._loss_writer.send(b"\0")
        return f"session ended after {server.calls} calls, {server.rows} rows: {why}"

    def _summarise(self) -> None:
        self._peers.summarise(is_over=True)
        for name, count in self._admissions.refused.items():
            _log.info("MOESHM_%s was met %d times", name.upper(), count)

    def _drain(self) -> None:
        self._draining.set()
        self._admissions.evict_all(Busy("the worker shuts down; connect to the next one"))
        self._refusals.finish(_REFUSALS_S)
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _log.error("a session did not finish within %g s", DRAIN_TIMEOUT_S)


@contextlib.contextmanager
def _used_memory(backend: Backend, transport: Transport) -> Iterator[int]:
    """While the backend uses the transport's memory; how much its device reaches by itself."""
    direct_bytes = 0
    with contextlib.ExitStack() as stack:
        if isinstance(backend, MemoryUser):
            for memory in transport.memory():
                used = stack.enter_context(contextlib.closing(backend.use_memory(memory)))
                direct_bytes += used.direct_bytes
        yield direct_bytes


def notify_systemd(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A leading @ stands for the zero byte of an abstract address.
    target = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), target)
        except OSError as error:
            _log.info("NOTIFY_SOCKET=%s did not take %s: %s", address, state, error)


def _max_tokens(backend: Backend) -> int:
    """Most tokens in one call: what its arrays may take of the memory that is free now."""
    free = process.available_memory()
    # In float32: the input, the sum, and every selected expert's row.
    per_token = max(
        4 * (info.hidden_size * (2 + info.top_k) + 2 * info.intermediate_size)
        for info in backend.layers.values()
    )
    return max(1, min(protocol.MAX_TOKENS, int(free * _MEMORY_SHARE / per_token)))
