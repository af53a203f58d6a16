#!/bin/sh
# Installs what the product depends on into a virtual environment, in the versions of requirements.txt. From the repository's root:
#   sh docker/locked.sh /opt/venv [options of uv pip install]
set -eu
environment=$1
shift
pins=$(mktemp)
# As constraints: requirements.txt also lists development tools, and CUDA packages that PyTorch's CPU build does without.
grep '^[A-Za-z0-9]' requirements.txt > "$pins"
uv pip install --python "$environment/bin/python" --constraint "$pins" "$@" -r pyproject.toml
rm "$pins"
