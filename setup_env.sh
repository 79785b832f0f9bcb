#!/bin/sh
# Makes or updates ./noprop_env beside this script, then runs its arguments inside it:
#   ./setup_env.sh python noprop_example.py
# Without arguments it only sets up. PYTHON names the interpreter of a new environment: to change it, remove ./noprop_env.
set -u
# settings that send packages elsewhere are for other environments: pip refuses them in this one
unset PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_USER=0

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P) || exit 1
env="$here/noprop_env"
stamp="$env/requirements.stamp"

fail() {
    echo "setup_env.sh: $1" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The stamp's last line is the environment's place: one that was moved is rebuilt, as its programs name the old place.
sums=$(cd "$here" && cksum requirements*.txt) || fail "the requirements files are missing"
wanted=$(printf '%s\n%s' "$sums" "$env")

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || ! is_new_enough "$env/bin/python"; then
    # none, half-made, moved or broken: begin anew
    if [ "$(tail -n 1 "$stamp" 2>/dev/null)" != "$env" ] || ! is_new_enough "$env/bin/python"; then
        [ -z "${PYTHON:-}" ] || is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 or newer"
        python=""
        for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
            if [ -n "$candidate" ] && is_new_enough "$candidate"; then
                python=$candidate
                break
            fi
        done
        [ -n "$python" ] || fail "Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python ./setup_env.sh"
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"
        echo "Making $env ..." >&2
        rm -rf "$env"
        "$python" -m venv "$env" || fail "could not make $env (see above)"
    fi
    echo "Installing the requirements (about 6 GB with CUDA builds of torch; minutes) ..." >&2
    was=$(cat "$stamp" 2>/dev/null || true)
    # whoever stops an update may go on; what is stopped while it is new is begun anew
    if [ -n "$was" ]; then printf '%s\n' "$env" >"$stamp"; else rm -f "$stamp"; fi
    env -u PYTHONPATH \
        "$env/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements-dev.txt" >&2 || {
        if [ -n "$was" ] && [ "$was" != "$env" ]; then
            printf '%s\n' "$was" >"$stamp" # pip downloads first
            fail "the update failed (see above); what was there still works: . '$env/bin/activate'. The next call tries again."
        fi
        [ -z "$was" ] || fail "the update failed (see above); the next call tries again."
        fail "the installation failed (see above); the next call tries again. Another Python: rm -rf '$env'; PYTHON=python3.13 ./setup_env.sh"
    }
    printf '%s\n' "$wanted" >"$stamp" || fail "cannot write $stamp"
fi

if [ $# -eq 0 ]; then
    echo "Ready. Activate with:  . '$env/bin/activate'"
    exit 0
fi
VIRTUAL_ENV="$env"
PATH="$env/bin:$PATH"
export VIRTUAL_ENV PATH
exec "$@"
