"""Both sides of a handshake, in threads of this process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from moeshm import session
from moeshm.errors import MoeshmError
from moeshm.session import ControlSocket, Session
from tests.wire import PATIENCE_S, dense_info, meanwhile

LAYERS = {0: dense_info(64, 4, 2), 3: dense_info(128, 8, 4)}


def address(listener: socket.socket) -> str:
    """Of a listener."""
    return f"unix:{listener.getsockname()}"


@contextlib.contextmanager
def opened(
    listener: socket.socket, transport: str = "auto", capacity: int = 64, max_tokens: int = 4096
) -> Iterator[tuple[Session, Session]]:
    """Both sides of a session: the client's and the worker's."""
    sides: list[Session] = []

    def accept() -> None:
        control = ControlSocket(listener.accept()[0])
        try:
            sides.append(session.accept(control, LAYERS, "null", max_tokens, PATIENCE_S))
        except MoeshmError:
            control.close()

    with contextlib.ExitStack() as stack:
        with meanwhile(accept):
            client = session.connect(address(listener), transport, capacity, PATIENCE_S)
            stack.enter_context(client)
        (worker,) = sides
        stack.enter_context(worker)
        yield client, worker
