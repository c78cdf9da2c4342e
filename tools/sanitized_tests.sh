#!/usr/bin/env bash
# Runs the ring's tests on builds with the thread, address and undefined-behaviour sanitizers; with
# the first also those of a client that many threads use.
#
# usage: tools/sanitized_tests.sh PYTHON [pytest arguments]
#   SANITIZERS   which of them, by default "thread address,undefined": a build for each word
# The builds live in a temporary copy, so the checkout's own stays as it is. A report fails the
# run wherever it was made: every process of the tests writes its reports to one folder.
set -euo pipefail

python=$(realpath --no-symlinks "$1")
shift
tools=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
copy=$(mktemp -d --suffix=-moeshm-sanitized)
trap 'rm -rf "$copy" "$copy"-*' EXIT
reports=$copy/reports
sanitizers=${SANITIZERS:-thread address,undefined}
client_tests="tests/unit/test_link.py tests/unit/test_claims.py tests/crash/test_many_callers.py \
    tests/crash/test_back_pressure.py"

# The interpreter is not instrumented, so the runtime has to be there before it starts.
runtime_of() {
    local library path
    library=lib$1.so
    path=$(gcc -print-file-name="$library")
    if [ "$path" = "$library" ]; then
        echo "gcc has no $library; install its sanitizer runtimes (Fedora: dnf install $library;" \
            "Debian's gcc depends on them)" >&2
        return 1
    fi
    realpath "$path"
}

# The kernel may place memory where TSan's shadow is (mmap_rnd_bits above 28).
fixed_addresses=()
if setarch --addr-no-randomize true 2>/dev/null; then
    fixed_addresses=(setarch --addr-no-randomize)
fi

# Each in a copy of its own, all at once; for the ring's tests only what they import.
build() {
    local modules="_end _mapping _ring"
    case $1 in *thread*) modules= ;; esac
    MOESHM_SANITIZE=$1 ONLY_MODULES=$modules "$tools/build_copy.sh" "$python" "$copy-$1"
}

run_tests() {
    local sanitizer=$1 folder=$copy-$1 preload= tests=tests/ring
    shift
    case $sanitizer in
        *thread*) preload=$(runtime_of tsan) && tests="$tests $client_tests" || return ;;
        *address*) preload=$(runtime_of asan) || return ;;
    esac
    echo "--- $sanitizer sanitizer: testing"
    cd "$folder"
    # shellcheck disable=SC2086 # one word a test file
    # PYTHONMALLOC: with CPython's own allocator ASan could not see where an object ends.
    # detect_leaks: what CPython keeps until it exits is not ours.
    # die_after_fork: tests start processes while they have threads.
    "${fixed_addresses[@]}" env PYTHONPATH="$folder" PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 \
        TSAN_OPTIONS="log_path=$reports/thread die_after_fork=0" \
        ASAN_OPTIONS="log_path=$reports/address detect_leaks=0" \
        UBSAN_OPTIONS="log_path=$reports/undefined print_stacktrace=1" \
        ${preload:+LD_PRELOAD="$preload"} \
        "$python" -m pytest -p no:cacheprovider $tests "$@"
}

declare -A builds
for sanitizer in $sanitizers; do
    echo "--- $sanitizer sanitizer: building"
    build "$sanitizer" &
    builds[$sanitizer]=$!
done
failed=0
for sanitizer in $sanitizers; do
    wait "${builds[$sanitizer]}" || { failed=1 && continue; }
    mkdir -p "$reports"
    run_tests "$sanitizer" "$@" || failed=1
    if [ -n "$(ls "$reports")" ]; then
        cat "$reports"/*
        echo "--- $sanitizer sanitizer: the reports above fail the run"
        failed=1
    fi
    rm -rf "$reports"
done
exit "$failed"
