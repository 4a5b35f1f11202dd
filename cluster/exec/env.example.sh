# shellcheck shell=bash
# The site's values for train_fabric.sh and create.sh: copy this file to cluster/exec/env.sh and edit the copy.
# A line that is commented out stands at what happens without it. What is set when sbatch is called wins over this file.
# No keys here: WANDB_API_KEY and HF_TOKEN belong in your own login environment.
#
# Account and partition are read when sbatch is called, before this file is: give them as flags of sbatch, or put
# SBATCH_ACCOUNT and SBATCH_PARTITION into your shell's start-up file.

# ---- Software: a container, or a Python on the shared file system ----

# Apptainer image that cluster/building/build-image.sh made. Empty: no container.
export CONTAINER_PATH="${CONTAINER_PATH-}"
# Host folders that the container sees beside the project's and the one that sbatch was called in: data, run folders.
# export APPTAINER_BIND="${APPTAINER_BIND-/data,/scratch}"
# Interpreter. Without it: python in the container; else the project's .venv if there is one; else python3.
# export PYTHON="${PYTHON-/path/to/env/bin/python}"

# ---- The run; flags after train_fabric.sh win over these ----

# Recipe. Without it: pretrain/configs/LLaMmlein_1B.yaml of the project.
# export CONFIG="${CONFIG-pretrain/configs/LLaMmlein_7B.yaml}"
# The folders that scripts/prepare_data.py wrote, and the tokenizer's.
# export TRAIN_DATA_DIR="${TRAIN_DATA_DIR-/data/de/train}"
# export VAL_DATA_DIR="${VAL_DATA_DIR-/data/de/val}"
# export TOKENIZER_PATH="${TOKENIZER_PATH-/data/tokenizer}"
# Node-local disk where the shards in use are staged: for a shared file system that is slow or busy.
# export CACHE_DIR="${CACHE_DIR-/local/$USER/llammlein}"
# CPU threads of one rank. Without it: the job's CPUs a task.
# export OMP_NUM_THREADS="${OMP_NUM_THREADS-8}"

# ---- Ethernet: how ranks find each other ----

# Network interface, as `ip -brief address` names it on a compute node, for NCCL's first contact and for gloo (what the
# ranks agree on once a step). Needed where the first interface that is up does not reach the other nodes.
# export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME-ib0}"
# export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME-ib0}"

# ---- InfiniBand or RoCE: gradients and weights between nodes ----

# Adapters that NCCL may use, as `ibstat -l` names them. Needed where a node also has adapters for storage or Ethernet.
# "=mlx5_0,mlx5_1" is exactly these two, "^mlx5_2" all but this one.
# export NCCL_IB_HCA="${NCCL_IB_HCA-=mlx5_0,mlx5_1,mlx5_2,mlx5_3}"
# Entry of the adapter's address table; RoCE only, usually 3 (RoCE v2 over IPv4). On InfiniBand leave it alone.
# export NCCL_IB_GID_INDEX="${NCCL_IB_GID_INDEX-3}"
# Service level, where the site gives training traffic a lane of its own.
# export NCCL_IB_SL="${NCCL_IB_SL-0}"
# How long an adapter waits before it sends again: 4.096 microseconds * 2^value. Raise to 22 or 23 where large jobs die
# of "transport retry counter exceeded".
# export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT-20}"
# 1 turns InfiniBand off: slow, but tells a fault of the fabric from one of the program.
# export NCCL_IB_DISABLE="${NCCL_IB_DISABLE-0}"
# Farthest apart that GPU and adapter may be to talk without host memory: PIX (one switch), PXB (several), PHB (the CPU),
# SYS (across sockets). Without it NCCL decides.
# export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL-PXB}"

# ---- What is told when something hangs ----

# WARN: errors with their reason. INFO: also which adapters and paths were chosen; read that once on a new cluster.
export NCCL_DEBUG="${NCCL_DEBUG-WARN}"
# With INFO, a file a process instead of the job's log; %h is the host, %p the process id.
# export NCCL_DEBUG_FILE="${NCCL_DEBUG_FILE-nccl-%h-%p.log}"
# PyTorch keeps the last collectives of each rank (how many), and writes them to FILE followed by the rank when one runs
# into its time limit of ten minutes, or when the watchdog ends the run: they show which rank did not come. These are
# the program's own defaults; the file is nccl-rank-N in the run folder's watchdog/. torch 2.10 to 2.14 know these names.
# export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE-2000}"
# export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT-1}"
# export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE-/scratch/nccl-rank-}"
