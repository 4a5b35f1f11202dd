# shellcheck shell=bash
# Which Python runs the project: sourced by train_fabric.sh and scripts/create.sh, which define `root` and `fail`.

# python_command [FLAG...]: sets the array `python`. With CONTAINER_PATH it is that image's Python (PYTHON, else python),
# run by `apptainer exec FLAG...` with the project's folder and the current one bound. Without, it is PYTHON, else the
# Python of the project's .venv, else python3.
python_command() {
    local engine
    if [[ -n ${CONTAINER_PATH:-} ]]; then
        [[ -e $CONTAINER_PATH ]] || fail "no container CONTAINER_PATH=$CONTAINER_PATH"
        engine=$(command -v apptainer || command -v singularity) ||
            fail "CONTAINER_PATH is set, but neither apptainer nor singularity is on this node's PATH"
        # shellcheck disable=SC2154  # root is set by those who source this file
        python=("$engine" exec --bind "$root" --bind "$PWD" "$@" --pwd "$PWD" "$CONTAINER_PATH" "${PYTHON:-python}")
    elif [[ -n ${PYTHON:-} ]]; then
        python=("$PYTHON")
    elif [[ -x $root/.venv/bin/python ]]; then
        python=("$root/.venv/bin/python")
    else
        # shellcheck disable=SC2034  # read by those who source this file
        python=(python3)
    fi
}
