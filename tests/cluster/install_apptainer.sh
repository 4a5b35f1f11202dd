#!/usr/bin/env bash
# A real Apptainer and a small image, for tests: as root, on Debian 12 or newer.
#
#   install_apptainer.sh IMAGE VENV     installs Apptainer if there is none, and writes IMAGE: a shell, coreutils and what
#                                       VENV's Python needs of the system's libraries. Its /opt/env is a link to VENV,
#                                       which the caller binds: as in llammlein.def, /opt/env/bin is first on PATH.
#
# Debian 12 has no Apptainer. It comes from Debian's newest suite with that suite's C library, which lies beside the
# system's own, not in its place. Exit code 3: this machine cannot have it, with the reason in one line.
set -euo pipefail
shopt -s inherit_errexit

EXIT_CANNOT=3
APT_LOCK=/tmp/tests-apt.lock # other tests install too, and apt does not wait
SOURCES=/etc/apt/sources.list.d/debian.sources
NEWER=/opt/newer-libc

cannot() {
    echo "install_apptainer.sh: $*" >&2
    exit "$EXIT_CANNOT"
}

(($# == 2)) || {
    echo "usage: install_apptainer.sh IMAGE VENV" >&2
    exit 2
}
image=$(realpath -m "$1") venv=$(realpath "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A package and the libraries that it depends on, by name.
with_libraries() {
    apt-cache "${newest[@]}" depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "$1" | grep -E "^($1|(lib|zlib).*)$"
}

install_apptainer() {
    local packages package libraries tool file
    [[ $EUID == 0 ]] || cannot "installing Apptainer needs root"
    [[ $(uname -m) == x86_64 && -f $SOURCES ]] || cannot "no Apptainer here, and no $SOURCES to install it from"
    type -P patchelf >/dev/null ||
        { flock "$APT_LOCK" apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive flock "$APT_LOCK" apt-get install -qq patchelf; } >/dev/null 2>&1 ||
        cannot "apt-get could not install patchelf"
    mkdir -p "$work"/{sources,lists/partial,cache/archives/partial,packages}
    awk 'BEGIN {RS = ""} NR == 1' "$SOURCES" | sed -E 's/^Suites:.*/Suites: sid/' >"$work/sources/newest.sources"
    newest=(-qq -oDir::Etc::sourcelist=/dev/null -oDir::Etc::sourceparts="$work/sources" -oAPT::Sandbox::User=root
        -oDir::State::Lists="$work/lists" -oDir::Cache="$work/cache")
    apt-get "${newest[@]}" update || cannot "apt-get update failed for Debian's newest suite"
    packages=$(for package in apptainer squashfs-tools squashfuse; do with_libraries "$package"; done | sort -u)
    # shellcheck disable=SC2086  # words
    (cd "$work/packages" && apt-get "${newest[@]}" download $packages) || cannot "apt-get could not download Apptainer"
    mkdir -p "$NEWER"
    for package in "$work"/packages/*.deb; do
        if [[ $package == */apptainer_* ]]; then dpkg -x "$package" "$work/apptainer"; else dpkg -x "$package" "$NEWER"; fi
    done
    cp -rn "$work/apptainer/." /
    libraries=$NEWER/usr/lib/x86_64-linux-gnu
    for tool in mksquashfs unsquashfs squashfuse squashfuse_ll; do
        ln -sf "$NEWER/usr/bin/$tool" "/usr/local/bin/$tool"
    done
    for file in /usr/bin/apptainer /usr/lib/x86_64-linux-gnu/apptainer/bin/starter \
        "$NEWER"/usr/bin/{mksquashfs,unsquashfs,squashfuse,squashfuse_ll}; do
        patchelf --set-interpreter "$libraries/ld-linux-x86-64.so.2" "$file"
        patchelf --force-rpath --set-rpath "$libraries" "$file"
    done
    # A machine that is itself a container has not all of root's capabilities to give away.
    sed -i 's/^root default capabilities = .*/root default capabilities = no/' /etc/apptainer/apptainer.conf
    apptainer --version >/dev/null || cannot "Apptainer does not start"
}

# build_image: packs $work/root.
build_image() {
    local root=$work/root program file
    mkdir -p "$root"/{bin,usr/bin,etc,tmp,opt,proc,sys,dev,root,home,var/tmp,.singularity.d/env}
    for program in bash sh env cat ls mkdir uname hostname; do cp -L "$(type -P "$program")" "$root/usr/bin/"; done
    cp "$root/usr/bin/sh" "$root/usr/bin/bash" "$root/bin/"
    find "$root/usr/bin" "$(realpath "$venv/bin/python")" "$("$venv/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("stdlib"))')/lib-dynload" \
        "$venv"/lib/python*/site-packages/torch/lib/libtorch_{cpu,python}.so -type f -exec ldd {} + 2>/dev/null |
        sed -nE 's/^.* => (\/[^ ]+) .*$/\1/p; s/^\t(\/[^ ]+) .*$/\1/p' | grep -v /site-packages/ | sort -u |
        while read -r file; do cp -L --parents "$file" "$root"; done
    ln -s "$venv" "$root/opt/env"
    touch "$root/etc/passwd" "$root/etc/group" # Apptainer adds the user
    echo 'PRETTY_NAME="small image for tests"' >"$root/etc/os-release"
    # shellcheck disable=SC2016  # written as it stands
    echo 'export PATH=/opt/env/bin:/usr/bin:/bin' >"$root/.singularity.d/env/90-environment.sh"
    apptainer build --mksquashfs-args '-Xcompression-level 1' "$image" "$root" >"$work/build.log" 2>&1 ||
        cannot "apptainer builds no image: $(tail -n 1 "$work/build.log")"
    apptainer exec "$image" bash -c : >"$work/exec.log" 2>&1 || cannot "apptainer starts no image: $(tail -n 1 "$work/exec.log")"
}

apptainer --version >/dev/null 2>&1 || install_apptainer
build_image
