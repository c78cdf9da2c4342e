#!/bin/sh
# Makes a virtual environment and installs moeshm in it, editable; or says what is missing.
#
# usage: tools/install.sh VENV [EXTRAS [REQUIREMENT...]]
#   EXTRAS        names of pyproject.toml's extras, with commas between them
#   REQUIREMENT   resolved together with moeshm, like torch==2.13.0
# PYTHON in the environment names the interpreter to use.
set -eu

venv=$1
extras=${2:-}
if [ $# -ge 2 ]; then shift 2; else shift; fi

fail() {
    printf 'moeshm: %s\n' "$*" >&2
    exit 1
}

# Runs on any Python 3, so that an old one can say that it is too old.
check='
import os, sys, sysconfig
if sys.version_info < (3, 10):
    sys.exit("is Python %d.%d; 3.10 or newer is needed" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)")
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    sys.exit("has no Python.h (Debian, Ubuntu: apt install python3-dev)")
'

# Prints the first interpreter that will do, or what is wrong with each.
find_python() {
    complaints=
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        command -v "$python" >/dev/null || continue
        if complaint=$("$python" -c "$check" 2>&1); then
            echo "$python"
            return
        fi
        complaints="$complaints
  $(command -v "$python") $(echo "$complaint" | head -n 1)"
    done
    fail "no usable Python; install 3.10 or newer, or name one with PYTHON=...${complaints:-
  ${PYTHON:-python3}: not found}"
}

[ "$(uname -s)" = Linux ] || fail "this is $(uname -s); only Linux is supported"
# The kernel's and the C library's headers are packages of their own on some systems.
printf '#include <linux/futex.h>\n#include <stdint.h>\n' | ${CC:-cc} -E -x c - >/dev/null ||
    fail "no C compiler that works; install one (Debian, Ubuntu: apt install gcc libc6-dev)" \
        "or name one with CC=..."

# A folder whose interpreter is gone (a system upgrade) is made anew.
if ! "$venv/bin/python" -c "" 2>/dev/null; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
echo "building moeshm${extras:+[$extras]} and installing it in $venv${*:+ with $*}"
# Before pip 21.3 there were no editable installs of such a project.
"$venv/bin/python" -m pip install --quiet "pip>=21.3"
"$venv/bin/python" -m pip install --quiet "$@" --editable ".${extras:+[$extras]}"
