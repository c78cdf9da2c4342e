"""Lower layers never import upper ones; imports inside functions count as well."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: From the ground up. A name stands for a module or for a package with all that is in it; a
#: module may import its own layer and those above it in this table.
LAYERS = {
    "L0 ground": (
        "errors settings process signals files printable layers dtypes segment kernels"
        " _version _atomics _crash_points _formats _inputs _mapping _end _ring _words _role _totals"
        " _closing"
    ),
    "L1 session": (
        "_wire _descriptors _claims _stream protocol orders descriptors _device_arrays"
        " device_arrays handshake access limits foreign_fds sizes session transport"
    ),
    "L2 compute": "checkpoint backends",
    "L3 policy": "placement swaps routing_stats policy",
    "L4 engine": (
        "client connecting sessions engine_device choice call windows arrays link outbox receivers"
        " held fallback reconnect offload supervisor worker"
        " views holdings slab_server turns device_calls device_future device_watch daemon listening"
        " refusals stats logs metrics integrations diagnosis"
    ),
    # `moeshm` itself is the public names: who imports them imports everything.
    "L5 user": "cli demo soak bench moeshm __main__",
}
RANKS = {name: rank for rank, names in enumerate(LAYERS.values()) for name in names.split()}

#: "importer imports imported": the reason why this import may go upwards.
EXCEPTIONS: dict[str, str] = {}

_CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<source>[\w.]+)[ \t]+c?import[ \t]+(?P<names>\([^)]*\)|[^#\n]*)"
    r"|c?import[ \t]+(?P<modules>[^#\n]*))",
    re.MULTILINE,
)


def find_modules(root: Path) -> dict[str, list[Path]]:
    """Dotted names, as installed, of the package's modules, with the files each is made of."""
    modules: dict[str, list[Path]] = {}
    for folder, package in ((root / name, name) for name in ("moeshm", "kernels", "bench")):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".pyx", ".pxd"):
                parts = path.relative_to(folder).with_suffix("").parts
                below = [] if package == "moeshm" else [package]
                name = ".".join(["moeshm", *below, *(part for part in parts if part != "__init__")])
                modules.setdefault(name, []).append(path)
    return modules


def imports_of(source: str, module: str, is_package: bool, is_python: bool) -> Iterator[str]:
    """Dotted names that it imports; `from a import b` gives a.b, be that a module or not."""
    read = _python_imports if is_python else _cython_imports
    for level, stem, names in read(source):
        base = module.split(".")
        if level:
            base = base[: len(base) - level + is_package]
        prefix = ".".join([*(base if level else []), *([stem] if stem else [])])
        yield from (f"{prefix}.{name}" if prefix else name for name in names)


def _python_imports(source: str) -> Iterator[tuple[int, str, list[str]]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield 0, "", [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def _cython_imports(source: str) -> Iterator[tuple[int, str, list[str]]]:
    for found in _CYTHON_IMPORT.finditer(source):
        words = (found["names"] or found["modules"]).strip("()").split(",")
        names = [word.split()[0] for word in words if word.strip()]
        stem = (found["source"] or "").lstrip(".")
        yield len(found["source"] or "") - len(stem), stem, names


def component(name: str) -> str:
    """The word of the table that a dotted name belongs to."""
    return name.split(".")[1] if "." in name else "moeshm"


def upward_imports(modules: dict[str, list[Path]]) -> dict[str, str]:
    """ "importer imports imported" for each import that goes up, with the two layers."""
    upward = {}
    layer_names = list(LAYERS)
    for module, paths in modules.items():
        for path in paths:
            imported = imports_of(
                path.read_text(), module, path.stem == "__init__", path.suffix == ".py"
            )
            for name in imported:
                if name.partition(".")[0] != "moeshm":
                    continue
                # `from moeshm import connect` asks for no module of that name but for moeshm.
                part = component(name)
                part = part if any(component(known) == part for known in modules) else "moeshm"
                rank, own = RANKS.get(part, -1), RANKS.get(component(module), len(RANKS))
                if rank > own:
                    upward[f"{module} imports {'moeshm.' * (part != 'moeshm')}{part}"] = (
                        f"{layer_names[own]} imports {layer_names[rank]}"
                    )
    return upward


def test_every_module_has_a_layer() -> None:
    missing = [name for name in find_modules(ROOT) if component(name) not in RANKS]
    assert not missing, f"{missing}: in no layer; add each to LAYERS in this file"


def test_lower_layers_never_import_upper_ones() -> None:
    upward = upward_imports(find_modules(ROOT))
    wrong = {found: layers for found, layers in upward.items() if found not in EXCEPTIONS}
    assert not wrong


def test_every_exception_is_still_needed() -> None:
    upward = upward_imports(find_modules(ROOT))
    assert not [exception for exception in EXCEPTIONS if exception not in upward]


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("segment.py", "from .client import connect", "moeshm.client"),
        ("segment.py", "from . import client", "moeshm.client"),
        ("segment.py", "from . import connect", "moeshm"),
        ("segment.py", "def f():\n    from moeshm.cli import main", "moeshm.cli"),
        ("segment.py", "if TYPE_CHECKING:\n    import moeshm.client as c", "moeshm.client"),
        ("segment.py", "import json, moeshm", "moeshm"),
        ("backends/cpu.py", "from ..client import connect", "moeshm.client"),
        ("backends/__init__.py", "from ..client import connect", "moeshm.client"),
        ("_ring.pyx", "from .client cimport Thing, Other", "moeshm.client"),
        ("_ring.pyx", "def f():\n    from . import (errors,\n        client)", "moeshm.client"),
        ("_ring.pxd", "cimport moeshm.client as c", "moeshm.client"),
    ],
)
def test_an_import_that_goes_up_is_found(
    tmp_path: Path, file: str, source: str, expected: str
) -> None:
    for other in ("__init__.py", "client.py", "errors.py", "cli/__init__.py", file):
        path = tmp_path / "moeshm" / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "moeshm" / file).write_text(source)
    module = "moeshm." + file.partition(".")[0].replace("/__init__", "").replace("/", ".")
    assert list(upward_imports(find_modules(tmp_path))) == [f"{module} imports {expected}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("client.py", "from . import errors\nfrom .errors import MoeshmError"),
        ("client.py", "import moeshmetics.cli\nfrom clients import cli"),
        ("_ring.pyx", "from libc.errno cimport errno\nimport os\nfrom .errors import RingFull"),
    ],
)
def test_an_import_that_goes_down_or_elsewhere_is_fine(
    tmp_path: Path, file: str, source: str
) -> None:
    (tmp_path / "moeshm").mkdir()
    (tmp_path / "moeshm" / "errors.py").write_text("")
    (tmp_path / "moeshm" / file).write_text(source)
    assert upward_imports(find_modules(tmp_path)) == {}
