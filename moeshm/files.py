"""Files that others read meanwhile: who opens one gets the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import SettingError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` in one step when the block ends well.

    A file that was there keeps its permissions; what is no regular file, like /dev/stdout, is
    written as it is. SettingError: it cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))  # a symbolic link stays one
        new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with new.open("xb") as file:
                if target.exists():
                    os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)
                yield file
            new.replace(target)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SettingError(f"{path} cannot be written: {error.strerror or error}") from error
