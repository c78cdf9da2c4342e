#!/usr/bin/env bash
# Builds the extension modules in a copy of the checkout, whose own build stays as it is.
#
# usage: [MOESHM_SANITIZE=... MOESHM_CRASHPOINTS=1 ONLY_MODULES=...] tools/build_copy.sh PYTHON FOLDER
#   FOLDER   must not be there yet; set PYTHONPATH to it, and run from it
# A sanitizer's has the modules that setup.py is to build and no other, so that none is without it
# unnoticed. Crash points are in few modules: the others are the checkout's, but for what is outdated.
set -euo pipefail

python=$(realpath --no-symlinks "$1")
folder=$(realpath --no-symlinks "$2")
mkdir "$folder"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# With their times: what Cython has made of the sources is not made again.
cp -r --preserve=timestamps --parents pyproject.toml setup.py README.md LICENSE moeshm kernels bench \
    tests "$folder"
cd "$folder"
export CC=gcc
if [ -n "${MOESHM_SANITIZE:-}" ]; then
    find moeshm -name '*.so' -delete
else
    # Not left to setup.py, which looks for what it built last in build/, not here.
    outdated=
    for source in moeshm/*.pyx moeshm/backends/gpu/*.pyx; do
        built=$(echo "${source%.pyx}".*.so)
        if [ ! -f "$built" ] || [ -n "$(find "$source" moeshm/*.pxd moeshm/*.h -newer "$built")" ]; then
            outdated="$outdated $(basename "$source" .pyx)"
        fi
    done
    [ -z "$outdated" ] || env -u MOESHM_CRASHPOINTS ONLY_MODULES="$outdated" \
        "$python" setup.py --quiet build_ext --inplace
fi
"$python" setup.py --quiet build_ext --inplace
