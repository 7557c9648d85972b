#!/usr/bin/env bash
# Build the Dockerfile without an engine, a registry or a GPU, and run its self-test and a recipe inside.
#   tests/container/build_on_debian.sh [FOLDER]     root; FOLDER needs 20 GB; it keeps the base for another time
# Needs debootstrap and buildah (Debian: apt-get install debootstrap buildah). The base is a minimal Debian 13, whose
# Python is 3.13, and torch is the one of constraints.txt. OPTIONS="--volume=..." goes to every `buildah bud`.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
GIVEN=${1:-}
FOLDER=${GIVEN:-$(mktemp -d)}
mkdir -p "$FOLDER"
STORE=(--root "$FOLDER/store" --runroot "$FOLDER/run" --storage-driver vfs)
read -ra MORE <<<"${OPTIONS:-}"

clean_up() {
  for CONTAINER in $(buildah "${STORE[@]}" containers --quiet); do buildah "${STORE[@]}" rm "$CONTAINER"; done
  rm -rf "$FOLDER/store" "$FOLDER/run"
  if [ -z "${1:-}" ]; then rm -rf "$FOLDER"; fi
}
trap 'clean_up "$GIVEN"' EXIT

if [ ! -e "$FOLDER/debian/usr/bin/python3" ]; then
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-pip trixie "$FOLDER/debian"
fi
CONTAINER=$(buildah "${STORE[@]}" from scratch)
buildah "${STORE[@]}" copy "$CONTAINER" "$FOLDER/debian" /
buildah "${STORE[@]}" commit --rm "$CONTAINER" elastic-debian

buildah "${STORE[@]}" bud --isolation chroot ${MORE[@]+"${MORE[@]}"} --build-arg BASE_IMAGE=localhost/elastic-debian \
  --build-arg KERNELS=none --tag elastic "$REPO"

# The entry point, as the user of the image: the self-test, and a recipe that needs neither data nor weights.
CONTAINER=$(buildah "${STORE[@]}" from localhost/elastic)
buildah "${STORE[@]}" run --isolation chroot "$CONTAINER" -- /opt/elastic/launch/entrypoint.sh selftest
buildah "${STORE[@]}" run --isolation chroot "$CONTAINER" -- /opt/elastic/launch/entrypoint.sh cost --config-name elastic_12b
buildah "${STORE[@]}" run --isolation chroot "$CONTAINER" -- id
printf 'container: built and passed\n'
