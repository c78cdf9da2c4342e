"""Types of the extension; the behaviour is documented in `_closing.pyx`."""

import socket

def close_socket(sock: socket.socket, is_over: bool, other: int = -1) -> None: ...
