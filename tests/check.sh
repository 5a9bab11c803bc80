#!/usr/bin/env bash
# Everything that must hold, for people and CI alike: installs what is missing, then lint, format and tests.
#   bash tests/check.sh            whole
#   bash tests/check.sh -k queue   words after it go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

# A virtual environment of one's own is used as it is; otherwise one is made here.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -c 'import torch, torchvision, pytest, ruff' 2>/dev/null || {
  echo "installing requirements.txt (some gigabytes, minutes) ..."
  python -m pip install -q -r requirements.txt
}
echo "python $(python -V | cut -d' ' -f2), torch $(python -c 'import torch; print(torch.__version__)')"

ruff check .
ruff format --check .
python -m pytest -q "$@"
