#!/usr/bin/env bash
# Builds the Apptainer image of the checked-out commit; uncommitted changes are left out.
#
#   TORCH_INDEX_URL=... bash cluster/building/build-image.sh [IMAGE]       IMAGE: default llammlein.sif
#
# Needs Apptainer 1.2 or SingularityCE 4.0 (build arguments), about 25 GB in TMPDIR, a network, and either root or a
# site that allows --fakeroot. No GPU.
#   TORCH_INDEX_URL   index of the PyTorch project's wheels for CUDA 13.0: the --index-url in the command that the
#                     "Get Started" page of PyTorch's site shows for Linux, pip, CUDA 13.0
#   TORCH_VERSION FLASH_ATTN_3_VERSION FLASH_ATTN_4_VERSION QUACK_VERSION   instead of the pins in llammlein.def
#   BUILD_FLAGS       more flags for `apptainer build`, such as --fakeroot
set -euo pipefail
shopt -s inherit_errexit

fail() {
    echo "build-image.sh: error: $*" >&2
    exit 2
}

(($# <= 1)) || fail "one argument at most: the image to write"
engine=$(command -v apptainer || command -v singularity) ||
    fail "neither apptainer nor singularity is on PATH: install Apptainer 1.2 or newer, or load the site's module"
[[ -n ${TORCH_INDEX_URL:-} ]] ||
    fail "TORCH_INDEX_URL is not set: the index of PyTorch's wheels for CUDA 13.0 (the head of this script says where to find it)"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
commit=$(git -C "$root" rev-parse HEAD) || fail "$root is no git checkout: the image is built from a commit"
image=$(realpath -m "${1:-llammlein.sif}")
[[ ! -e $image ]] || fail "$image is already there: remove it, or name another image"

umask 022 # files keep their mode in the image, where other users must read them
context=$(mktemp -d)
chmod 755 "$context"
trap 'rm -rf "$context"' EXIT
git -C "$root" archive "$commit" | tar -x -C "$context"
echo "$commit" > "$context/COMMIT"
arguments=()
for name in TORCH_INDEX_URL TORCH_VERSION FLASH_ATTN_3_VERSION FLASH_ATTN_4_VERSION QUACK_VERSION; do
    [[ -z ${!name:-} ]] || arguments+=(--build-arg "$name=${!name}")
done
read -ra flags <<< "${BUILD_FLAGS:-}"
cd "$context"
"$engine" build "${flags[@]}" "${arguments[@]}" "$image.partial" cluster/building/llammlein.def
mv "$image.partial" "$image"
echo "built $image of commit $commit"
