# Sourced by the scripts beside it: `ensure_venv run|dev` makes `.venv` and installs the project into it.
#
# `.venv` is shared: `dev` holds everything that `run` needs, so either script may come first, and neither undoes the
# other. Nothing is installed again while pyproject.toml and the version are unchanged. stdout is never written to.
# PYTHON=/path/to/python chooses the interpreter that a new `.venv` is made with.

readonly needs_python="install it (on Debian and Ubuntu: apt install python3 python3-venv) or name one with PYTHON=/path/to/python3"

say() { printf 'scripts/%s: %s\n' "${0##*/}" "$*" >&2; }

# Prints the first Python on PATH that is new enough and can make virtual environments; says why there is none.
find_python() {
    local candidate verdict why="there is no python3; Python 3.11 or newer is needed: $needs_python"
    local names=("${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11) candidates=()
    [ -n "${PYTHON:-}" ] && names=("$PYTHON")
    mapfile -t candidates < <(type -aP -- "${names[@]}")
    [ -n "${PYTHON:-}" ] && why="PYTHON=$PYTHON is no program that can be run; name a Python 3.11 or newer"
    local first=true
    for candidate in "${candidates[@]}"; do
        verdict=$("$candidate" -c '
import sys
if sys.version_info < (3, 11):
    print("old %d.%d" % sys.version_info[:2])
else:
    try:
        import ensurepip, venv
        print("good")
    except ImportError:
        print("bare")
' 2>/dev/null </dev/null) || continue
        case $verdict in
        good) printf '%s\n' "$candidate" && return ;;
        old*) $first && why="$candidate is Python ${verdict#old } and 3.11 or newer is needed: $needs_python" ;;
        bare) why="$candidate has no venv module: install it (on Debian and Ubuntu: apt install python3-venv) or name another Python with PYTHON=/path/to/python3" ;;
        esac
        first=false
    done
    say "$why"
    return 1
}

# What an installation depends on, as one word: this folder, the project's metadata, what is installed.
stamp_of() { { printf '%s\n' "$PWD" "$1" && cat pyproject.toml vmm/__init__.py; } | sha256sum | cut -d ' ' -f 1; }

installed() {
    [ -x .venv/bin/python ] && [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$(stamp_of "$1")" ]
}

# ensure_venv run|dev, in the project's root
ensure_venv() {
    installed dev || installed "$1" || (
        flock 9 # two scripts at once: the second waits for the first's work
        installed dev || installed "$1" || install "$1"
    ) 9<.
}

install() {
    local python target=.
    say "setting up .venv (once; needs the Python package index)"
    if ! [ -x .venv/bin/python ] || [ "$(cat .venv/made-in 2>/dev/null)" != "$PWD" ]; then
        python=$(find_python) || return 1
        if ! "$python" -m venv --clear .venv >&2; then
            say "$python could not make .venv here; see above, and check that $PWD can be written to and has space"
            return 1
        fi
        printf '%s\n' "$PWD" >.venv/made-in
    fi
    # A dev environment stays one, whoever renews it.
    if [ "$1" = dev ] || [ -e .venv/installed-dev ]; then
        set -- dev
        target='.[dev]'
    fi
    rm -f .venv/installed-*
    if ! .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input --editable "$target" >&2; then
        say "pip could not install $target into .venv; see above (the package index must be reachable)"
        return 1
    fi
    stamp_of "$1" >".venv/installed-$1"
}
