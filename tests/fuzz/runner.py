"""Runs targets, and says in JSON what they were given and what came of it.

`python -m tests.fuzz.runner [--engine seeded|guided] [--runs N] [--minutes M] TARGET...`; the
guided engine needs atheris. Data that breaks a target is written to a folder, which is named; of a
seeded run, seed and number repeat it as well (`--only`). Exits with 1 if anything broke.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz import targets
from tests.fuzz.choices import data_of

#: A target that breaks is run no further than this.
_MOST_CRASHES = 5
#: Executions between two looks at the clock.
_BATCH = 64
#: Longest data: of the seeded engine it is shorter.
_MAX_BYTES = 512
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+)")


def main() -> int:
    """As the module says."""
    arguments = _parse()
    folder = Path(arguments.crashes)
    run = _run_guided if arguments.engine == "guided" else _run_seeded
    n_crashes = 0
    for name in arguments.targets:
        summary = {"target": name, "engine": arguments.engine, **run(name, arguments, folder)}
        n_crashes += summary["crashes"]
        print(json.dumps(summary), flush=True)
    if n_crashes:
        print(f"{n_crashes} executions broke; their data is in {folder}", file=sys.stderr)
    return bool(n_crashes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("seeded", "guided"), default="seeded")
    parser.add_argument("--runs", type=int, default=0, help="of each target; 0 for no limit")
    parser.add_argument("--minutes", type=float, default=0.0, help="for each target; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run one execution of the seed, and show it")
    parser.add_argument("--corpus", default="build/fuzz/corpus", help="a folder a target is in it")
    parser.add_argument("--crashes", default="build/fuzz/crashes")
    parser.add_argument("targets", nargs="+", choices=targets.ALL)
    arguments = parser.parse_args()
    if not arguments.runs and not arguments.minutes:
        arguments.runs = 1000
    return arguments


# --- seeded -----------------------------------------------------------------------------------


def _run_seeded(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is in the corpus, and then data that is made from the seed."""
    target = targets.load(name)
    outcomes: collections.Counter[str] = collections.Counter()
    crashes = executions = 0
    start = time.monotonic()
    deadline = start + 60 * arguments.minutes if arguments.minutes else float("inf")
    with contextlib.closing(target):
        if arguments.only is not None:
            print(target.test_one(data_of(arguments.seed, arguments.only)))
            return {"executions": 1, "crashes": 0}
        corpus = [*target.seeds(), *_read_corpus(Path(arguments.corpus) / name)]
        most = arguments.runs or sys.maxsize
        while executions < most and crashes < _MOST_CRASHES:
            if executions % _BATCH == 0 and time.monotonic() > deadline:
                break
            index = executions - len(corpus)
            data = corpus[executions] if index < 0 else data_of(arguments.seed, index)
            executions += 1
            try:
                outcomes[target.test_one(data)] += 1
            except Exception:
                crashes += 1
                where = _keep(folder, name, data)
                print(f"{name}: seed {arguments.seed}, number {index}: {where}", file=sys.stderr)
                traceback.print_exc()
                # What it kept may be anything now.
                target.close()
    return {
        "seed": arguments.seed,
        "executions": executions,
        "seconds": round(time.monotonic() - start, 1),
        "corpus_files": len(corpus),
        "corpus_bytes": sum(map(len, corpus)),
        "distinct_outcomes": len(outcomes),
        "crashes": crashes,
    }


def _read_corpus(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*"))] if folder.is_dir() else []


def _keep(folder: Path, name: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    return path


# --- guided -----------------------------------------------------------------------------------


def _run_guided(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """libFuzzer's own loop in a process of its own, and then the smallest corpus that covers as
    much."""
    corpus = Path(arguments.corpus) / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in targets.load(name).seeds():
        _keep(corpus, "seed", seed)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    limits = [f"-max_total_time={60 * arguments.minutes:.0f}", f"-runs={arguments.runs or -1}"]
    code, log = _fuzz(
        name,
        *limits,
        f"-seed={arguments.seed}",
        f"-artifact_prefix={folder / name}-",
        str(corpus),
    )
    done = _DONE.search(log)
    if done is None or code:
        print(log[-8000:], file=sys.stderr)
    executions, edges, features = map(int, done.groups() if done else (0, 0, 0))
    _minimise(name, corpus)
    kept = _read_corpus(corpus)
    return {
        "seed": arguments.seed,
        "executions": executions,
        "seconds": round(time.monotonic() - start, 1),
        "corpus_files": len(kept),
        "corpus_bytes": sum(map(len, kept)),
        "edges": edges,
        "features": features,
        "crashes": int(done is None or code != 0),
    }


def _fuzz(name: str, *options: str) -> tuple[int, str]:
    # libFuzzer ends the process without a chance to clean up.
    with tempfile.TemporaryDirectory(suffix="-moeshm-fuzz") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", name, f"-max_len={_MAX_BYTES}", *options],
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            check=False,
        )
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


def _minimise(name: str, corpus: Path) -> None:
    small = corpus.with_name(f"{name}-small")
    small.mkdir()
    code, log = _fuzz(name, "-merge=1", str(small), str(corpus))
    if code:
        print(log[-2000:], file=sys.stderr)
    kept = list(small.iterdir())
    if kept and not code:
        for path in corpus.iterdir():
            path.unlink()
        for path in kept:
            path.rename(corpus / path.name)
    for path in small.iterdir():
        path.unlink()
    small.rmdir()


if __name__ == "__main__":
    sys.exit(main())
