"""The life of a worker process: its socket, its sessions' threads, signals, readiness, the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import selectors
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from . import process, protocol, session
from .backends import Backend, MemoryUser
from .errors import AddressInUse, DeviceLost, MoeshmError
from .holdings import Holdings, Load
from .session import ControlSocket
from .signals import signals_as_bytes
from .slab_server import SlabServer
from .transport import Transport
from .turns import Turns
from .views import SessionViews
from .worker import SessionServer

_log = logging.getLogger(__name__)

#: How long a client may take for its part of the handshake.
HANDSHAKE_TIMEOUT_S = 5.0
#: How long sessions may take to finish what they have, once the worker drains.
DRAIN_TIMEOUT_S = 30.0
_BACKLOG = 128
#: A connection that was not accepted stays in the queue, and would be tried all the time.
_ACCEPT_PAUSE_S = 0.25
#: A call may take this share of the memory that is free when the worker starts.
_MEMORY_SHARE = 1 / 16


class Daemon:
    """Serves a backend at `unix:PATH` until SIGTERM or SIGINT, or until `lifeline` ends.

    `lifeline`: a pidfd of whoever started the worker; -1 for none. `load`: reads the experts that
    clients ask for beyond the backend's; None for none. AddressInUse: a live worker listens there.
    SettingError: `listen`.
    """

    def __init__(
        self, backend: Backend, listen: str, lifeline: int = -1, load: Load | None = None
    ) -> None:
        self._holdings = Holdings(backend, load)
        self._path = Path(session.parse_address(listen))
        self._lifeline = lifeline
        self._turns = Turns()
        self._draining = threading.Event()
        self._threads: set[threading.Thread] = set()
        self._device_lost: DeviceLost | None = None
        self._max_tokens = _max_tokens(backend)
        self._listener, self._inode = _listen(self._path)

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
                selector.register(self._listener, selectors.EVENT_READ)
                selector.register(signals, selectors.EVENT_READ)
                selector.register(losses, selectors.EVENT_READ)
                if self._lifeline >= 0:
                    selector.register(self._lifeline, selectors.EVENT_READ)
                notify_systemd("READY=1")
                _log.info("listening at unix:%s", self._path)
                self._accept_until_told(selector, signals, losses)
        finally:
            notify_systemd("STOPPING=1")
            self._stop_listening()
            self._drain()
        if self._device_lost is not None:
            raise self._device_lost

    def _accept_until_told(
        self, selector: selectors.BaseSelector, signals: socket.socket, losses: socket.socket
    ) -> None:
        while True:
            for key, _ in selector.select():
                if key.fileobj is self._listener:
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
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # Out of fds, or the client is gone already.
            _log.warning("a connection could not be accepted: %s", error)
            self._draining.wait(_ACCEPT_PAUSE_S)
            return
        thread = threading.Thread(
            target=self._serve, args=(sock,), name="moeshm-session", daemon=True
        )
        self._threads = {each for each in self._threads if each.is_alive()}
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or no memory for one's stack
            _log.warning("a connection could not be served: %s", error)
            sock.close()
            return
        self._threads.add(thread)

    def _serve(self, sock: socket.socket) -> None:
        control = ControlSocket(sock)
        try:
            level, outcome = self._serve_client(control)
        finally:
            control.close()
        # Only now, so that whoever reads it can rely on its being freed.
        _log.log(level, "process %d: %s", control.peer_pid, outcome)

    def _serve_client(self, control: ControlSocket) -> tuple[int, str]:
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
                )
            except (MoeshmError, OSError) as error:
                return logging.WARNING, f"got no session: {error}"
            # Until before the memory is unmapped, whatever ends the session.
            with opened, _used_memory(views.backend, opened.transport) as direct_bytes:
                return logging.INFO, self._serve_session(control, opened, views, slab, direct_bytes)

    def _serve_session(
        self,
        control: ControlSocket,
        opened: session.Session,
        views: SessionViews,
        slab: SlabServer,
        direct_bytes: int,
    ) -> str:
        welcome = opened.welcome
        _log.info(
            "process %d: session over %s, up to %d tokens a call%s%s%s%s",
            control.peer_pid,
            welcome.transport,
            welcome.max_tokens,
            f" ({welcome.stepped_down})" if welcome.stepped_down else "",
            f", {direct_bytes / 2**20:.1f} MiB registered for the device" if direct_bytes else "",
            f", {slab.summary}" if slab.summary else "",
            f" ({welcome.slab_refused})" if welcome.slab_refused else "",
        )
        server = SessionServer(opened, views, self._turns, self._draining, slab)
        why = server.serve()
        slab.wait_until_taken(opened.peer_is_gone)
        if server.device_lost is not None:
            self._device_lost = server.device_lost
            # It is closed when the worker drains already.
            with contextlib.suppress(OSError):
                self._loss_writer.send(b"\0")
        return f"session ended after {server.calls} calls, {server.rows} rows: {why}"

    def _stop_listening(self) -> None:
        with contextlib.suppress(OSError):
            # Not if another worker took the path over in the meantime.
            if os.stat(self._path).st_ino == self._inode:
                self._path.unlink()
        self._listener.close()

    def _drain(self) -> None:
        self._draining.set()
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


def _listen(path: Path) -> tuple[socket.socket, int]:
    """A listening socket, readable by its owner only, in the place of a stale one; its inode."""
    with _folder_lock(path.parent):
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(str(path))
            # Before listen(), so that nobody connects before the mode holds.
            path.chmod(0o600)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            return listener, os.stat(path).st_ino
        except OSError as error:
            listener.close()
            raise AddressInUse(
                error.errno, f"cannot listen at {path}: {error.strerror}; choose another path"
            ) from error


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Between looking at a path and taking it, no other worker may take it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise AddressInUse(
            error.errno, f"cannot listen in {folder}: {error.strerror}; make the folder first"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AddressInUse(errno.EEXIST, f"{path} exists and is no socket; choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except FileNotFoundError:  # its owner was just removing it
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise AddressInUse(
                    error.errno, f"{path} cannot be taken over: {error.strerror}"
                ) from error
    raise AddressInUse(
        errno.EADDRINUSE, f"a live process listens at {path}; stop it, or choose another path"
    )


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
