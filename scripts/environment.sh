# Sourced by the other scripts: finds Python, makes virtual environments, and says in one sentence what is missing.

checkout=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

say() {
    printf '%s\n' "$*" >&2
}

fail() {
    say "$(basename -- "$0"): $*"
    exit 1
}

# Sets $python to a Python >= 3.11: $PYTHON, or the first that works of those usually found.
find_python() {
    for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14 python; do
        if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            return 0
        fi
    done
    fail "Python 3.11 or newer is missing: install it, or name it with PYTHON=/path/to/python3."
}

# make_environment DIR [EXTRA]: a virtual environment with this checkout installed; nothing to do when it is up to date.
make_environment() {
    environment=$1
    extra=${2:-}
    find_python
    wanted=$("$python" - "$checkout" "$extra" <<'PROBE'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = b"".join((root / name).read_bytes() for name in ("pyproject.toml", "clawnet/__init__.py"))
print(sys.version, root, sys.argv[2], hashlib.sha256(files).hexdigest())
PROBE
    )
    if [ -f "$environment/.installed" ] && [ "$(cat "$environment/.installed")" = "$wanted" ] \
        && "$environment/bin/python" -c 'import clawnet' >/dev/null 2>&1; then
        return 0
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "Python's venv module is missing: install it (Debian and Ubuntu: apt-get install python3-venv)."
    say "installing clawnet into $environment"
    "$python" -m venv --clear "$environment" || fail "the virtual environment $environment could not be made."
    if ! "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$checkout${extra:+[$extra]}" </dev/null >&2; then
        command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 \
            || fail "pip could not install what clawnet needs; a C compiler, which may be what it asks for, is missing."
        fail "pip could not install what clawnet needs; its reason stands above."
    fi
    printf '%s\n' "$wanted" >"$environment/.installed"
}
