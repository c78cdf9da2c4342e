#!/usr/bin/env bash
# Kills and stops clients and workers at every crash point, in a build that has them.
#
# usage: tools/crash_matrix.sh PYTHON [pytest arguments]
#        tools/crash_matrix.sh PYTHON --runs N [--seed S] [--minutes M] [--shot I]
# The first takes every point once for each side, signal, transport and two reachings.
# The second takes N random shots and prints a summary as JSON; docs/crashes.md explains it.
# The build lives in a temporary copy, so the checkout's own stays as it is.
set -euo pipefail

python=$(realpath --no-symlinks "$1")
shift
tools=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
folder=$(mktemp -d --suffix=-moeshm-crash-points)
trap 'rm -rf "$folder"' EXIT

echo "--- building with crash points" >&2
MOESHM_CRASHPOINTS=1 "$tools/build_copy.sh" "$python" "$folder/copy" >&2
cd "$folder/copy"
export PYTHONPATH=$PWD OPENBLAS_NUM_THREADS=1
if [[ ${1:-} == --runs ]]; then
    "$python" -m tests.crash.matrix.long_run "$@"
else
    "$python" -m pytest -p no:cacheprovider tests/crash/matrix "$@"
fi
