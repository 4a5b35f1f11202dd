#!/usr/bin/env bash
# A training run as a Slurm job, which continues by itself after time limits, preemption and lost nodes.
#
#   sbatch cluster/exec/train_fabric.sh [--learning_rate 3e-4 ...]       from the project's folder
#   sbatch --nodes=8 --time=48:00:00 cluster/exec/train_fabric.sh ...    sbatch's flags win over the lines below
#   DRY_RUN=1 bash cluster/exec/train_fabric.sh ...                      prints the srun command line, starts nothing
#
# The site's values come from one file, CLUSTER_ENV (default: cluster/exec/env.sh; env.example.sh explains each). All
# arguments go to pretrain/tinyllama_fabric.py. docs/cluster.md says what to do when a job fails.
#
# How a job stops and continues: 120 s before the job's end, Slurm sends USR1 to this script, which sends it to srun and so
# to all ranks. They save the same step and exit with 75. Then this script requeues the job, and --resume auto continues
# from the newest whole checkpoint. After a plain scancel (TERM) the ranks save too, but the job is not requeued. A run that
# hangs is ended by its watchdog and requeued once. A run that loses a rank starts again inside the job. On sites that do
# not requeue, use cluster/exec/submit_chain.sh.
#SBATCH --job-name=llammlein
#SBATCH --nodes=1
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
shopt -s inherit_errexit

EXIT_BAD_INPUT=2 EXIT_REQUEUE=75 # as in lit_gpt/cli.py
EXIT_USR1=138                    # of a process that USR1 killed: Python itself was still starting
FIRST_PORT=10000 PORTS=20000     # below the ports that Linux gives to outgoing connections (32768 and up)
PEERS_WAIT_S=120                 # after a rank has exited, srun kills the others when this time is over

say() {
    echo "train_fabric.sh: $*" >&2
}

fail() {
    say "error: $*"
    exit "$EXIT_BAD_INPUT"
}

# Slurm runs a copy of this file from its spool folder; then the project is the folder where sbatch was called, or --chdir.
project_root() {
    local here candidate
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    for candidate in "$here/../.." "${SLURM_SUBMIT_DIR:-$here}" "$PWD"; do
        if [[ -f $candidate/pretrain/tinyllama_fabric.py ]]; then
            (cd "$candidate" && pwd)
            return
        fi
    done
    fail "pretrain/tinyllama_fabric.py is not beside this script: call sbatch from the project's folder"
}

# build_command [ARGUMENT...]: sets the array `command`: srun, the container if there is one, the program, its settings.
build_command() {
    # shellcheck source=cluster/exec/python_command.sh
    source "$root/cluster/exec/python_command.sh"
    folders_seen "$@"
    python_command --nv
    supervisor=("${python[@]}" "$root/scripts/supervise.py" --restarts "$RESTARTS"
        --nodes "${SLURM_NNODES:-1}" --spare_nodes "$SPARE_NODES")
    command=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait="$PEERS_WAIT_S" --kill-on-bad-exit=0 "${python[@]}")
    command+=("$root/pretrain/tinyllama_fabric.py" --config "${CONFIG:-$(default_recipe)}")
    unless_given --train_data_dir "${TRAIN_DATA_DIR:-}" "$@"
    unless_given --val_data_dir "${VAL_DATA_DIR:-}" "$@"
    unless_given --tokenizer_path "${TOKENIZER_PATH:-}" "$@"
    unless_given --cache_dir "${CACHE_DIR:-}" "$@"
    command+=(--resume auto "$@")
}

# folders_seen [ARGUMENT...]: sets the array `seen`: the paths that the site and the arguments name, for the container.
folders_seen() {
    local text word words
    seen=()
    for text in "${TRAIN_DATA_DIR:-}" "${VAL_DATA_DIR:-}" "${TOKENIZER_PATH:-}" "${CACHE_DIR:-}" "${CONFIG:-}" \
        "${COMPILE_CACHE_DIR:-}" "${MODEL_NAME:-}" "$@"; do
        [[ $text != --*=* ]] || text=${text#*=}
        IFS=',[]"'\' read -ra words <<<"$text" # a mixture is a list of folders
        for word in "${words[@]}"; do
            [[ $word != */* ]] || seen+=("$word")
        done
    done
}

# As lit_gpt/launch/site.py, which does it where the program is called without this script.
default_recipe() {
    local recipe=$root/pretrain/configs/${MODEL_NAME:-LLaMmlein_1B}.yaml
    [[ -f $recipe ]] || recipe=$root/pretrain/configs/LLaMmlein_1B.yaml
    echo "$recipe"
}

# unless_given FLAG VALUE [ARGUMENT...]: adds the flag to `command`, unless VALUE is empty or an ARGUMENT is the flag:
# the program would take two folders of training data as a mixture.
unless_given() {
    local flag=$1 value=$2 argument
    shift 2
    [[ -n $value ]] || return 0
    for argument in "$@"; do
        [[ $argument != "$flag" && $argument != "$flag="* ]] || return 0
    done
    command+=("$flag" "$value")
}

# srun sends USR1 to every rank. At TERM it would kill the ranks, so TERM is only noted: Slurm itself sends it to the ranks.
stop_asked='' cancelled='' srun_pid=''
# shellcheck disable=SC2317,SC2329  # called by a trap
on_usr1() {
    stop_asked=yes
    say "USR1: asking the ranks to save and stop"
    [[ -z $srun_pid ]] || kill -USR1 "$srun_pid" 2>/dev/null || say "srun has already ended"
}
# shellcheck disable=SC2317,SC2329  # called by a trap
on_term() {
    cancelled=yes
    say "TERM: the job is being ended from outside"
}

# `wait` returns early at each signal that this script handles; once srun has ended, `wait` gives its exit code.
run_to_the_end() {
    trap on_usr1 USR1
    trap on_term TERM
    "${command[@]}" &
    srun_pid=$!
    [[ -z $stop_asked ]] || kill -USR1 "$srun_pid"
    while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" || true; done
    status=0
    wait "$srun_pid" || status=$?
}

# run_and_restart: runs the command until its end is final. After a fault that another start may mend, it runs again at
# once, in this job; scripts/supervise.py decides, and says which nodes to leave out. A stall that names no rank is none.
run_and_restart() {
    local left_out
    place_nodes ''
    while true; do
        run_to_the_end
        [[ -z $stop_asked && -z $cancelled && $status != 0 ]] || return 0
        [[ -e $RUN_REPORT/cause.json || ($status != "$EXIT_REQUEUE" && ! -e $REQUEUE_FILE) ]] || return 0
        left_out=$("${supervisor[@]}" --judge "$status" --report "$RUN_REPORT") || return 0
        rm -f "$REQUEUE_FILE"
        place_nodes "$left_out"
        say "starting the run again${left_out:+ without $left_out}"
    done
}

# place_nodes LEFT_OUT: sets `command` to run on the job's nodes but those left out, and but the spare ones.
place_nodes() {
    local nodes node chosen=() wanted=$((${SLURM_NNODES:-1} - SPARE_NODES))
    command=("${whole_command[@]}")
    [[ $SPARE_NODES != 0 || -n $1 ]] || return 0
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for node in $nodes; do
        [[ ,$1, == *,"$node",* || ${#chosen[@]} -ge $wanted ]] || chosen+=("$node")
    done
    ((${#chosen[@]})) || fail "no node is left: $1 failed"
    export MASTER_ADDR=${site_address:-${chosen[0]}}
    command=("${command[0]}" --nodes="${#chosen[@]}" --ntasks="$((${#chosen[@]} * ${SLURM_NTASKS_PER_NODE:-1}))"
        --nodelist="$(IFS=,; echo "${chosen[*]}")" "${command[@]:1}")
}

requeue_or_end() {
    local stopped_early='' how='saved and stopped'
    [[ $status != "$EXIT_USR1" || -z $stop_asked ]] || stopped_early=yes
    # srun reports only the highest exit code: 137, of the rank that hung and had to be killed.
    if [[ -e $REQUEUE_FILE ]]; then
        rm "$REQUEUE_FILE"
        say "job $SLURM_JOB_ID: the watchdog ended the run ($status)"
        status=$EXIT_REQUEUE how='was hanging'
    fi
    if [[ $status != "$EXIT_REQUEUE" && -z $stopped_early ]]; then
        say "job $SLURM_JOB_ID ended with $status"
        exit "$status"
    fi
    if [[ -n $cancelled && -z $stop_asked ]]; then
        say "job $SLURM_JOB_ID was cancelled: saved, not put back. The same sbatch goes on from the checkpoint"
        exit "$EXIT_REQUEUE"
    fi
    if [[ -n ${CHAIN_LINK:-} ]]; then
        say "job $SLURM_JOB_ID $how ($status): the next link of the chain goes on"
        exit "$EXIT_REQUEUE"
    fi
    say "job $SLURM_JOB_ID $how ($status): back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "error: Slurm refuses to requeue job $SLURM_JOB_ID: submit it again"
    exit "$EXIT_REQUEUE"
}

root=$(project_root)
cluster_env=${CLUSTER_ENV:-$root/cluster/exec/env.sh}
[[ -f $cluster_env ]] || fail "no site file $cluster_env: copy cluster/exec/env.example.sh there, or set CLUSTER_ENV"
# shellcheck source=cluster/exec/env.example.sh
source "$cluster_env"

RESTARTS=${RESTARTS:-3} SPARE_NODES=${SPARE_NODES:-0} site_address=${MASTER_ADDR:-}
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS: must be a number"
[[ $SPARE_NODES =~ ^[0-9]+$ && $SPARE_NODES -lt ${SLURM_NNODES:-1000000} ]] ||
    fail "SPARE_NODES=$SPARE_NODES: must be a number below that of the job's nodes (${SLURM_NNODES:-unknown})"

# Two jobs on one node must not use the same port.
export MASTER_PORT="${MASTER_PORT:-$((FIRST_PORT + ${SLURM_JOB_ID:-0} % PORTS))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export PYTHONUNBUFFERED=1

build_command "$@"
whole_command=("${command[@]}")
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no Slurm job: start it by sbatch $0, or set DRY_RUN=1"
export REQUEUE_FILE=$PWD/.requeue-$SLURM_JOB_ID # left by the watchdog: lit_gpt/launch/job.py
rm -f "$REQUEUE_FILE"
# The run saves before the job's end by itself. Newer Slurm releases set its time; an older one is asked for it.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    ends=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null) || ends=''
    ends=$(date --date="${ends:-unknown}" +%s 2>/dev/null) || ends=''
    [[ -z $ends ]] || export SLURM_JOB_END_TIME=$ends
fi
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), nodes ${SLURM_JOB_NODELIST:-?}, port $MASTER_PORT"
RUN_REPORT=$(mktemp -d "$PWD/.run-report-$SLURM_JOB_ID-XXXX") # the ranks' cause of a failure, for the supervisor
export RUN_REPORT
trap 'rm -rf "$RUN_REPORT"' EXIT
run_and_restart
requeue_or_end
