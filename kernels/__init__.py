"""The GPU sources that moeshm compiles at run time, one file per job."""

from __future__ import annotations

import functools
import re
from importlib import resources

_INCLUDE = re.compile(r'^#include "(?P<name>[\w.]+)"$', re.MULTILINE)


@functools.cache
def source(name: str) -> str:
    """The text of `name`, as `decode_mma.cu`, with the files of ours that it includes in their
    places: one string, so that whoever caches what was compiled sees every change."""
    return _expand(name, set())


def _expand(name: str, seen: set[str]) -> str:
    seen.add(name)
    text = resources.files(__name__).joinpath(name).read_text()

    def include(found: re.Match[str]) -> str:
        return "" if found["name"] in seen else _expand(found["name"], seen)

    return _INCLUDE.sub(include, text).replace("#pragma once\n", "")
