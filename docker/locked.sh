#!/bin/sh
# Install the product's dependencies into a virtual environment, in the versions of requirements.txt. Run from the repository's root:
#   sh docker/locked.sh /opt/venv [options of uv pip install]
set -eu
environment=$1
shift
pins=$(mktemp)
# The pins are only constraints, since requirements.txt also lists development tools and CUDA packages, which the CPU build of PyTorch
# does not need.
grep '^[A-Za-z0-9]' requirements.txt > "$pins"
uv pip install --python "$environment/bin/python" --constraint "$pins" "$@" -r pyproject.toml
rm "$pins"
