#!/usr/bin/env bash
# Fuzzes on builds with the address and the undefined-behaviour sanitizer; docs/fuzzing.md has more.
#
# usage: tools/fuzz.sh PYTHON [--minutes N | --runs N] [--seed N] [TARGET...]
#   --minutes, --runs   of each target on each build; 1 minute if neither is given
#   CORPUS, CRASHES     folders: what is begun with and added to, and data that broke a target; by
#                       default build/fuzz/corpus and build/fuzz/crashes
#   SANITIZERS          by default "address undefined"
# Prints a line of JSON for each target and build. With atheris and clang (CLANG, by default
# clang-19 or clang) the runs with the address sanitizer are guided by coverage, of compiled code,
# too.
set -euo pipefail

python=$(realpath --no-symlinks "$1")
shift
options=()
while [ $# -gt 0 ] && [ "${1#--}" != "$1" ]; do
    options+=("$1" "$2")
    shift 2
done
case " ${options[*]-} " in
    *" --minutes "* | *" --runs "*) ;;
    *) options+=(--minutes 1) ;;
esac
in_process="ring records handshakes streams slabs files"
live="live lying"
chosen="${*:-$in_process $live}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d --suffix=-moeshm-fuzz)
trap 'rm -rf "$folder"' EXIT
corpus=$(realpath --canonicalize-missing "${CORPUS:-build/fuzz/corpus}")
crashes=$(realpath --canonicalize-missing "${CRASHES:-build/fuzz/crashes}")
reports=$folder/reports
mkdir -p "$corpus" "$crashes" "$reports"

clang=${CLANG:-$(command -v clang-19 || command -v clang || true)}
runtime=$("$python" -c 'import atheris; print(atheris.path())' 2>/dev/null || true)
runtime=${runtime:+$runtime/asan_with_fuzzer.so}

# The targets of a kind that were asked for.
of_kind() {
    local each
    for each in $chosen; do
        case " $1 " in *" $each "*) echo "$each" ;; esac
    done
}

# usage: run FOLDER PRELOAD [options and targets of the runner]
run() {
    local build=$1 preload=$2
    shift 2
    # As tools/sanitized_tests.sh has them.
    (cd "$build" && env PYTHONPATH="$build" PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 \
        ASAN_OPTIONS="log_path=$reports/address detect_leaks=0 quarantine_size_mb=16" \
        UBSAN_OPTIONS="log_path=$reports/undefined print_stacktrace=1" \
        ${preload:+LD_PRELOAD="$preload"} \
        "$python" -m tests.fuzz.runner --corpus "$corpus" --crashes "$crashes" \
        "${options[@]}" "$@")
}

failed=0
for sanitizer in ${SANITIZERS:-address undefined}; do
    build=$folder/$sanitizer
    preload=
    [ "$sanitizer" = undefined ] || preload=$(realpath "$(gcc -print-file-name=libasan.so)")
    echo "--- $sanitizer sanitizer: building" >&2
    MOESHM_SANITIZE=$sanitizer tools/build_copy.sh "$python" "$build"
    targets=$(of_kind "$in_process")
    if [ "$sanitizer" = address ] && [ -n "$targets" ] && [ -n "$clang" ] && [ -f "$runtime" ]; then
        echo "--- address sanitizer: building for coverage" >&2
        cp -r "$build" "$build-coverage"
        (cd "$build-coverage" &&
            CC="$clang -fsanitize=fuzzer-no-link,address -fno-omit-frame-pointer" \
                LDSHARED="$clang -shared" "$python" setup.py --quiet build_ext --inplace --force)
        # shellcheck disable=SC2086 # one word a target
        run "$build-coverage" "$runtime" --engine guided $targets || failed=1
    elif [ -n "$targets" ]; then
        # shellcheck disable=SC2086
        run "$build" "$preload" $targets || failed=1
    fi
    targets=$(of_kind "$live")
    # shellcheck disable=SC2086
    [ -z "$targets" ] || run "$build" "$preload" $targets || failed=1
done
if [ -n "$(ls "$reports")" ]; then
    cat "$reports"/*
    echo "--- the reports above fail the run" >&2
    failed=1
fi
exit "$failed"
