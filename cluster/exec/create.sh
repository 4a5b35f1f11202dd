#!/usr/bin/env bash
# scripts/create.sh, which explains the arguments, as a Slurm job with the site's values.
#
#   sbatch cluster/exec/create.sh [CHECKPOINT] [FINAL_MODEL]                from the project's folder; needs no GPU
#   OUT_DIR=out/LLaMmlein_1B sbatch cluster/exec/create.sh                  the newest checkpoint of a run
#SBATCH --job-name=llammlein-export
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=40G
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file from its spool folder; then the project is the folder where sbatch was called.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ -f $root/scripts/create.sh ]] || root=${SLURM_SUBMIT_DIR:-$root}
cluster_env=${CLUSTER_ENV:-$root/cluster/exec/env.sh}
for needed in "$root/scripts/create.sh" "$cluster_env"; do
    [[ -f $needed ]] || {
        echo "create.sh: error: no $needed: call sbatch from the project's folder, with a site file (docs/cluster.md)" >&2
        exit 2
    }
done
# shellcheck source=cluster/exec/env.example.sh
source "$cluster_env"
exec bash "$root/scripts/create.sh" "$@"
