# shellcheck shell=bash
# Which Python runs the project: sourced by train_fabric.sh and scripts/create.sh, which define `root` and `fail`.

# python_command [FLAG...]: sets the array `python`. With CONTAINER_PATH it is that image's Python (PYTHON, else python),
# run by `apptainer exec FLAG...` with the project's folder, the current one and those of the array `seen` bound. Without,
# it is PYTHON, else the Python of the project's .venv, else python3.
python_command() {
    local engine binds=()
    if [[ -n ${CONTAINER_PATH:-} ]]; then
        [[ -e $CONTAINER_PATH ]] || fail "no container CONTAINER_PATH=$CONTAINER_PATH"
        engine=$(command -v apptainer || command -v singularity) ||
            fail "CONTAINER_PATH is set, but neither apptainer nor singularity is on this node's PATH"
        # shellcheck disable=SC2154  # root and seen are set by those who source this file
        bind "$root" "$PWD" "${seen[@]}"
        python=("$engine" exec "${binds[@]}" "$@" --pwd "$PWD" "$CONTAINER_PATH" "${PYTHON:-python}")
    elif [[ -n ${PYTHON:-} ]]; then
        python=("$PYTHON")
    elif [[ -x $root/.venv/bin/python ]]; then
        python=("$root/.venv/bin/python")
    else
        # shellcheck disable=SC2034  # read by those who source this file
        python=(python3)
    fi
}

# bind PATH...: adds the folders to `binds` (of a file its folder, of what is not there yet the folder where it will be
# made). Each once, and none that the site binds: of a second time Apptainer warns, from every rank.
bind() {
    local path entry bound=,
    local -a entries
    IFS=, read -ra entries <<<"${APPTAINER_BIND:-},${APPTAINER_BINDPATH:-},${SINGULARITY_BIND:-},${SINGULARITY_BINDPATH:-}"
    for entry in "${entries[@]}"; do # SOURCE[:DESTINATION[:OPTIONS]]
        [[ $entry != *:* ]] || entry=${entry#*:}
        bound+=${entry%%:*},
    done
    for path in "$@"; do
        path=$(realpath -ms "$path")
        while [[ ! -d $path ]]; do path=$(dirname "$path"); done
        [[ $path != / && $bound != *,"$path",* ]] || continue
        bound+=$path,
        binds+=(--bind "$path")
    done
}
