#!/bin/sh
# Installs Debian's compilers for AMD's cards, for tests/compile, and the model checker SPIN, for
# tests/models; or says why it does not.
#
# usage: tools/install_compilers.sh
# Those for NVIDIA's are wheels, of pyproject.toml's extra `compilers`.
set -eu

packages="hipcc clang-19 lld-19 llvm-19 spin"

missing=
for package in $packages; do
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
        missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "no apt-get: install hipcc, clang 19 with its lld and llvm, and spin, or their tests skip" >&2
elif [ "$(id -u)" != 0 ]; then
    echo "not root: run 'apt-get install$missing', or their tests skip" >&2
else
    echo "installing$missing"
    apt-get --quiet --quiet update
    # shellcheck disable=SC2086 # one word a package
    DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet install --no-install-recommends \
        --yes $missing >/dev/null
fi
