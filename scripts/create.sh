#!/usr/bin/env bash
# Exports a checkpoint of a training run to a Hugging Face folder, which is checked before it is published. Needs no GPU.
#
#   bash scripts/create.sh [CHECKPOINT] [FINAL_MODEL]       on a login node
#   sbatch scripts/create.sh [CHECKPOINT] [FINAL_MODEL]     as a job, from the project's folder
#   bash scripts/create.sh --all [--push_to OWNER/MODEL] [--watch]
#       every checkpoint of the run folder, to folders and branches on the Hub that are named by steps and tokens. The
#       training may be running: with --watch (and & or sbatch), each new checkpoint is exported, until the last step's.
#
# Without CHECKPOINT it takes the newest of the run folder. Environment variables:
#   OUT_DIR         run folder (default: $MODEL_NAME if that is a folder, else out/$MODEL_NAME)
#   MODEL_NAME      with OUT_DIR: model of the registry that the checkpoint must be; without: names the run folder
#   ITERATION_NUM   step of the checkpoint instead of the newest
#   TOKENIZER_PATH  tokenizer folder (default: the run's own)
#   FINAL_MODEL     folder to write (default: <run folder>/huggingface/step-XXXXXXXX, for an average average-XXXXXXXX);
#                   with --all, the folder of all exports (default: <run folder>/huggingface)
#   CONTAINER_PATH  Apptainer image to run in
#   PYTHON          interpreter (default: the project's .venv if there is one; python in the container)
# Every other argument goes to convert_lit_checkpoint.py: --dtype fp32, --vocabulary cut, ...
#SBATCH --job-name=llammlein-export
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=20G
#SBATCH --time=02:00:00
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as sh, which may not be bash
set -euo pipefail
shopt -s inherit_errexit

fail() {
    echo "create.sh: error: $*" >&2
    exit 2
}

# Slurm runs a copy of this file from its spool folder; then the project is the folder where sbatch was called.
project_root() {
    local here candidate
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    for candidate in "$here" "${SLURM_SUBMIT_DIR:-$here}" "${SLURM_SUBMIT_DIR:-$here}/.."; do
        if [[ -f $candidate/scripts/convert_lit_checkpoint.py ]]; then
            (cd "$candidate" && pwd)
            return
        fi
    done
    fail "scripts/convert_lit_checkpoint.py is not beside this script: call sbatch from the project's folder"
}

run_folder() {
    if [[ -n ${OUT_DIR:-} ]]; then
        echo "$OUT_DIR"
    elif [[ -z ${MODEL_NAME:-} ]]; then
        fail "no checkpoint given: name CHECKPOINT, or set OUT_DIR or MODEL_NAME to the run's folder"
    elif [[ -d $MODEL_NAME ]]; then
        echo "$MODEL_NAME"
    elif [[ -d out/$MODEL_NAME ]]; then
        echo "out/$MODEL_NAME"
    else
        echo "$root/out/$MODEL_NAME"
    fi
}

find_checkpoint() {
    local folder path newest=
    folder=$(run_folder)
    [[ -d $folder ]] || fail "no run folder $folder"
    if [[ -n ${ITERATION_NUM:-} ]]; then
        [[ $ITERATION_NUM =~ ^[0-9]+$ ]] || fail "ITERATION_NUM=$ITERATION_NUM: must be a step, such as 10000"
        printf '%s/iter-%08d-ckpt.pth\n' "$folder" "$((10#$ITERATION_NUM))"
        return
    fi
    for path in "$folder"/iter-*-ckpt.pth; do # the shell sorts them, and the step has a fixed width
        [[ -e $path ]] && newest=$path
    done
    [[ -n $newest ]] || fail "no checkpoint iter-XXXXXXXX-ckpt.pth in $folder"
    echo "$newest"
}

# Refuses a checkpoint that is not there, with the newest steps of its folder.
require_checkpoint() {
    local path steps=()
    [[ ! -e $1 ]] || return 0
    for path in "$(dirname "$1")"/iter-*-ckpt.pth; do
        [[ ! -e $path ]] || steps+=("$(basename "$path" | sed 's/^iter-0*\([0-9][0-9]*\)-ckpt\.pth$/\1/')")
    done
    ((${#steps[@]} <= 10)) || steps=(... "${steps[@]: -10}")
    fail "no checkpoint $1${steps:+; its folder has the steps ${steps[*]}}"
}

# The tokenizer folder that the run's settings name; else, as something to bind, the run folder.
run_tokenizer() {
    local run=$source named=''
    [[ -n $all ]] || run=$(dirname "$source")
    [[ ! -f $run/settings.yaml ]] || named=$(sed -nE "s/^tokenizer_path: *['\"]?(\/[^'\"]*)['\"]?$/\1/p" "$run/settings.yaml")
    echo "${named:-$run}"
}

root=$(project_root)
positional=()
while (($#)) && [[ $1 != --* ]]; do
    positional+=("$1")
    shift
done
all=
flags=()
for flag in "$@"; do
    case $flag in
        --all) all=1 ;;
        --a | --al) fail "no flag $flag; did you mean --all?" ;;
        *) flags+=("$flag") ;;
    esac
done
((${#positional[@]} <= 2)) || fail "two arguments at most before the flags: [CHECKPOINT] [FINAL_MODEL]"

if [[ -n $all ]]; then
    ((${#positional[@]} == 0)) || fail "--all takes no CHECKPOINT: set OUT_DIR or MODEL_NAME to the run's folder"
    [[ -z ${ITERATION_NUM:-} ]] || fail "--all and ITERATION_NUM=$ITERATION_NUM: every checkpoint, or that one?"
    source=$(run_folder)
    [[ -d $source ]] || fail "no run folder $source"
    source=$(cd "$source" && pwd)
    final_model=${FINAL_MODEL:-$source/huggingface}
    arguments=(--run_dir "$source" --destination_path "$final_model")
else
    source=${positional[0]:-}
    [[ -n $source ]] || source=$(find_checkpoint)
    require_checkpoint "$source"
    [[ ! -f $source/settings.yaml ]] || fail "$source is a run folder: OUT_DIR=$source exports its newest checkpoint"
    source=$(cd "$(dirname "$source")" && pwd)/$(basename "$source")
    name=$(basename "$source" | sed -n 's/^iter-\([0-9]*\)-ckpt\.pth$/step-\1/p; s/^average-/&/p')
    final_model=${positional[1]:-${FINAL_MODEL:-$(dirname "$source")/huggingface/${name:-step-unknown}}}
    arguments=(--checkpoint "$source" --destination_path "$final_model")
fi
[[ -z ${TOKENIZER_PATH:-} ]] || arguments+=(--tokenizer_path "$TOKENIZER_PATH")
[[ -z ${OUT_DIR:-} || -z ${MODEL_NAME:-} || -d $MODEL_NAME ]] || arguments+=(--model_name "$MODEL_NAME")

# shellcheck source=cluster/exec/python_command.sh
source "$root/cluster/exec/python_command.sh"
# The container can only bind a folder that exists.
[[ -z ${CONTAINER_PATH:-} ]] || mkdir -p "$(dirname "$final_model")" || fail "cannot write $final_model"
# shellcheck disable=SC2034  # read by python_command
seen=("$(dirname "$source")" "$(dirname "$final_model")" "${TOKENIZER_PATH:-$(run_tokenizer)}")
# shellcheck disable=SC2119  # no flag of its own
python_command
exec "${python[@]}" "$root/scripts/convert_lit_checkpoint.py" "${arguments[@]}" "${flags[@]}"
