"""A client that is lied to: `python -m tests.fuzz.lied_client unix:PATH`.

Of each line that it reads, a transport, it makes a call over that, after `anew` with a new client,
and writes what came of it: the bytes of the result in hex digits, or the name of the error.
"""

from __future__ import annotations

import sys

import moeshm
from moeshm.errors import CallError, ConnectError, MoeshmError
from tests.crash.arithmetic import FREE, make_inputs

#: A lie may be no answer at all.
TIMEOUT_S = 0.25
INPUTS = make_inputs(FREE, 1, n_tokens=2)


def main() -> None:
    """Until the end of input."""
    clients: dict[str, moeshm.ExpertClient] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        transport, *anew = line.split()
        client = clients.pop(transport, None)
        if anew and client is not None:
            client.close()
            client = None
        try:
            if client is None:
                client = moeshm.connect(sys.argv[1], transport=transport, timeout_s=10.0)
            result = client.compute(*INPUTS, timeout_s=TIMEOUT_S)
            said = result.tobytes().hex()
            clients[transport] = client
        except ConnectError:
            raise
        except MoeshmError as error:
            said = type(error).__name__
            if isinstance(error, CallError) and client is not None and _lives(client):
                clients[transport] = client
            elif client is not None:
                client.close()
        print(said, flush=True)


def _lives(client: moeshm.ExpertClient) -> bool:
    return client._link.loss is None


if __name__ == "__main__":
    main()
