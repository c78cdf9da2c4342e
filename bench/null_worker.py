"""An expert worker that computes nothing: what remains of a call is the way there and back.

python -m moeshm.bench.null_worker unix:PATH
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moeshm.backends.null import NullBackend
from moeshm.layers import LayerInfo

#: One layer of the model that docs/benchmarks.md names.
LAYER = 0
HIDDEN_SIZE = 2048
INTERMEDIATE_SIZE = 512
NUM_EXPERTS = 256
TOP_K = 8


def main(words: Sequence[str]) -> None:
    """Serve until SIGTERM."""
    (address,) = words
    layer = LayerInfo(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        experts=tuple(range(NUM_EXPERTS)),
    )
    # Here, as `call` needs only the sizes above.
    from moeshm.daemon import Daemon

    Daemon(NullBackend({LAYER: layer}), listen=address).run()


if __name__ == "__main__":
    main(sys.argv[1:])
