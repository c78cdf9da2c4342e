#!/usr/bin/env bash
# Builds the extension modules in a copy of the checkout, whose own build stays as it is.
#
# usage: [MOESHM_SANITIZE=... MOESHM_CRASHPOINTS=1] tools/build_copy.sh PYTHON FOLDER
#   FOLDER   must not be there yet; set PYTHONPATH to it, and run from it
set -euo pipefail

python=$(realpath --no-symlinks "$1")
folder=$(realpath --no-symlinks "$2")
mkdir "$folder"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# With their times: what Cython has made of the sources is not made again.
cp -r --preserve=timestamps --parents pyproject.toml setup.py README.md LICENSE moeshm kernels bench \
    tests "$folder"
find "$folder/moeshm" -name '*.so' -delete
cd "$folder"
CC=gcc "$python" setup.py --quiet build_ext --inplace
