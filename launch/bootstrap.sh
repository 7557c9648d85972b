#!/usr/bin/env bash
# Sets up the Python environment of this project, once. `make setup` calls it; so may you:
#
#   launch/bootstrap.sh                            # .venv in this clone, about 5 GB
#   VENV=/elsewhere launch/bootstrap.sh            # an environment that several clones share
#   PYTHON=/path/to/python3.12 launch/bootstrap.sh # with this interpreter
#
# Installs the dependencies of pyproject.toml (with the dev extra) at the versions in constraints.txt. Only an
# environment inside this clone also gets the project itself, editable; a shared one must not point at one clone, so
# there the Makefile's PYTHONPATH serves. A stamp in the environment says what it was made from: while that is
# unchanged, a further call does nothing and says nothing.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$REPO"
VENV=${VENV:-.venv}
case $VENV in
  /*) ;;
  *) VENV=$REPO/$VENV ;;
esac
STAMP=$VENV/.elastic-stamp
LOCK=$VENV/.elastic-lock
REQUIREMENTS=$VENV/.elastic-requirements.txt
RIGHT_PYTHON='import sys, ctypes, ssl, venv, zlib; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))'

say() { printf 'elastic: %s\n' "$*"; }

fail() {
  say "$*" >&2
  exit 1
}

runs() { "$@" >/dev/null 2>&1 </dev/null; }

is_private() { # the environment belongs to this clone alone
  case $VENV/ in
    "$REPO"/*) return 0 ;;
    *) return 1 ;;
  esac
}

wanted_stamp() {
  cksum <pyproject.toml
  cksum <constraints.txt
  if is_private; then printf '%s\n' "$REPO"; fi
}

is_set_up() { [ -x "$VENV/bin/python" ] && [ -r "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted_stamp)" ]; }

candidates() { # interpreters that may do, best first; a name on PATH can be a shim that answers to nothing
  local minor root
  for minor in 12 13; do # the versions in constraints.txt were resolved for 3.12
    type -aP "python3.$minor" || true
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
      printf '%s\n' "$root"/versions/3."$minor"*/bin/python
    done
    uv python find --python-preference only-managed "3.$minor" 2>/dev/null </dev/null || true
  done
  type -aP python3 python || true
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" -c "$RIGHT_PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.12 or 3.13 that runs; give another one"
    printf '%s\n' "$PYTHON"
    return
  fi
  while IFS= read -r candidate; do
    if [ -x "$candidate" ] && runs "$candidate" -c "$RIGHT_PYTHON"; then
      printf '%s\n' "$candidate"
      return
    fi
  done < <(candidates)
  fail "no Python 3.12 or 3.13 found that runs: install one (apt-get install python3.12-venv, pyenv install 3.12" \
    "or uv python install 3.12) or name yours with PYTHON=/path/to/python3.12"
}

check_compiler() {
  local compiler
  for compiler in ${CC:-} cc gcc clang; do
    if runs "$compiler" --version; then return; fi
  done
  fail "no C compiler found: install one (apt-get install build-essential, or your system's gcc or clang)"
}

refuse_other_folder() { # a slip in VENV= must not fill somebody's folder
  if [ -e "$VENV" ] && [ ! -e "$VENV/bin/python" ] && [ ! -e "$LOCK" ] && [ -n "$(ls -A "$VENV")" ]; then
    fail "VENV=$VENV has files but is no Python environment; give another place"
  fi
}

lock() { # one set-up of an environment at a time; the lock goes when this shell and its children end
  mkdir -p "$VENV"
  exec 9>"$LOCK"
  if runs command -v flock && ! flock -n 9; then
    say "waiting for another set-up of $VENV"
    flock 9
  fi
}

write_requirements() {
  "$VENV/bin/python" - >"$REQUIREMENTS" <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")
PYTHON
}

install_with_uv() { # arguments: what to install
  runs uv --version || return 1
  local quiet=()
  [ -t 2 ] || quiet=(--quiet)
  # Compiled once here: a process that must compile torch and Megatron-Core itself starts eight seconds later.
  if UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-120} uv pip install --compile-bytecode ${quiet[@]+"${quiet[@]}"} \
    --python "$VENV/bin/python" -c constraints.txt "$@"; then return; fi
  say "uv could not install; trying pip, which is slower"
  return 1
}

install_with_pip() { # arguments: what to install
  local pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
  if ! runs "${pip[@]}" --version; then
    runs "$VENV/bin/python" -m ensurepip ||
      fail "nothing to install with: install uv, or your Python's venv package (apt-get install python3.12-venv)"
    "${pip[@]}" install --quiet --upgrade pip # the one that comes with Python can be years old
  fi
  [ -t 1 ] || pip+=(--quiet)
  "${pip[@]}" install -c constraints.txt "$@"
}

install() { install_with_uv "$@" || install_with_pip "$@"; }

set_up() {
  local python=
  refuse_other_folder
  if [ ! -e "$VENV/bin/python" ]; then
    python=$(find_python)
  elif ! runs "$VENV/bin/python" -c "$RIGHT_PYTHON"; then
    fail "$VENV/bin/python is not a Python 3.12 or 3.13 that runs; remove that environment or give another VENV="
  fi
  check_compiler
  lock
  if is_set_up; then return; fi # another call has just done it
  rm -f "$STAMP"
  if [ -e "$VENV/bin/python" ]; then
    say "bringing $VENV to the versions in constraints.txt"
  else
    say "making $VENV with $python; this takes about 5 GB"
    rm -f "$VENV"/bin/python* # links to an interpreter that is gone
    "$python" -m venv --without-pip "$VENV"
  fi
  write_requirements
  install -r "$REQUIREMENTS"
  if is_private; then install --no-deps --no-build-isolation -e .; fi
  wanted_stamp >"$STAMP.new"
  mv "$STAMP.new" "$STAMP" # last, so that an interrupted set-up is taken up again
  say "$VENV is ready"
}

is_set_up || set_up
