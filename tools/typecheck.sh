#!/bin/sh
# Runs mypy on the package and its tests, then holds every .pyi against what was built.
#
# usage: tools/typecheck.sh PYTHON
# mypy knows nothing of setuptools' package-dir, so it is shown a tree of links with kernels/ and
# bench/ where they are installed. It names files so: moeshm/bench/ring.py is bench/ring.py.
set -eu

python=$(realpath --no-symlinks "$1")
root=$(pwd)
tree=build/typecheck

rm -rf "$tree"
mkdir -p "$tree/moeshm"
ln -s "$root"/moeshm/* "$root/kernels" "$root/bench" "$tree/moeshm/"
ln -s "$root/tests" "$tree/"
cd "$tree"
"$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" \
    --package moeshm --package tests
# What Cython adds by itself is in no stub.
"$python" -m mypy.stubtest --concise --mypy-config-file "$root/pyproject.toml" \
    --ignore-missing-stub --ignore-disjoint-bases --ignore-unused-allowlist \
    --allowlist "$root/tools/stubtest_allowlist.txt" \
    $(find -L moeshm -name '*.pyi' | sed 's/\.pyi$//; s:/:.:g')
