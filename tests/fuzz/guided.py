"""A coverage-guided run of one target: `python -m tests.fuzz.guided TARGET [libFuzzer's options]`.

Needs atheris. The compiled modules count, too, where they were built with
`-fsanitize=fuzzer-no-link` and libFuzzer's runtime was loaded before them (LD_PRELOAD);
tools/fuzz.sh does both.
"""

from __future__ import annotations

import sys

import atheris

from tests.fuzz import targets


def main() -> None:
    """Run until libFuzzer ends it."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["moeshm"]):
        target = targets.load(name)

    def test_one(data: bytes) -> None:
        target.test_one(data)

    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
