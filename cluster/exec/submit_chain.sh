#!/usr/bin/env bash
# A run longer than one job, for sites that do not requeue: LINKS jobs, each of which continues where the last one ended.
#
#   bash cluster/exec/submit_chain.sh LINKS [flags of sbatch ...] [-- settings of the run ...]      from the project's folder
#   bash cluster/exec/submit_chain.sh 5 --nodes=8 --time=24:00:00 -- --out_dir /scratch/runs/LLaMmlein_1B
#
# A link starts when the link before it has ended, however that ended. A link that finds the run finished ends at once, so
# too many links do no harm. Cancel a chain from its last link to its first: give scancel the job numbers in reverse.
set -euo pipefail

fail() {
    echo "submit_chain.sh: error: $*" >&2
    exit 2
}

links=${1:-}
[[ $links =~ ^[1-9][0-9]*$ ]] || fail "the first argument is the number of jobs, not '$links'"
shift
sbatch_flags=()
while (($#)); do
    if [[ $1 == -- ]]; then
        shift
        break
    fi
    sbatch_flags+=("$1")
    shift
done
type -P sbatch >/dev/null || fail "no sbatch here: call this on a login node"
script=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/train_fabric.sh
before=''
for ((link = 1; link <= links; link++)); do
    dependency=()
    [[ -z $before ]] || dependency=("--dependency=afterany:$before")
    before=$(CHAIN_LINK=$link sbatch --parsable --no-requeue "${dependency[@]}" "${sbatch_flags[@]}" "$script" "$@")
    before=${before%%;*} # a cluster's name may follow
    echo "link $link of $links: job $before"
done
