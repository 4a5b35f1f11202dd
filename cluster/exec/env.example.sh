# shellcheck shell=bash
# The site's values for train_fabric.sh and create.sh: copy this file to cluster/exec/env.sh and edit the copy.
# Lines that are commented out are examples. A variable that is set when sbatch is called wins over this file.
# Put no keys here: WANDB_API_KEY and HF_TOKEN belong in your own login environment.
#
# sbatch reads account and partition before it reads this file: give them as flags of sbatch, or put
# SBATCH_ACCOUNT and SBATCH_PARTITION into your shell's start-up file.

# ---- Software: a container, or a Python on the shared file system ----

# Apptainer image that cluster/building/build-image.sh made. Empty: no container.
export CONTAINER_PATH="${CONTAINER_PATH-}"
# Host folders that the container sees. The scripts add the project's, the one that sbatch was called in, and those that
# this file and the arguments name; needed for folders that a YAML file names, and where you type apptainer exec yourself.
# export APPTAINER_BIND="${APPTAINER_BIND-/data,/scratch}"
# Interpreter. Without it: python in the container; else the project's .venv if there is one; else python3.
# export PYTHON="${PYTHON-/path/to/env/bin/python}"

# ---- The run; arguments of train_fabric.sh win over these. The training program reads them without the script too ----

# Recipe. Without it: that of MODEL_NAME in pretrain/configs/ of the project if there is one, else LLaMmlein_1B.yaml.
# export CONFIG="${CONFIG-pretrain/configs/LLaMmlein_7B.yaml}"
# The folders that scripts/prepare_data.py wrote, and the tokenizer's.
# export TRAIN_DATA_DIR="${TRAIN_DATA_DIR-/data/de/train}"
# export VAL_DATA_DIR="${VAL_DATA_DIR-/data/de/val}"
# export TOKENIZER_PATH="${TOKENIZER_PATH-/data/tokenizer}"
# Folder on a node-local disk that caches the shards in use: for a shared file system that is slow or busy.
# export CACHE_DIR="${CACHE_DIR-/local/$USER/llammlein}"
# Folder of your own for all that is compiled, on a file system that all nodes see: a later start takes it from there.
# export COMPILE_CACHE_DIR="${COMPILE_CACHE_DIR-/scratch/$USER/compiled}"
# Restarts inside a job after a lost rank or node: at most so many (0: none).
# export RESTARTS="${RESTARTS-3}"
# Nodes of the job that the run does without until another is lost.
# export SPARE_NODES="${SPARE_NODES-0}"
# CPU threads of one rank. Without it: the job's CPUs per task.
# export OMP_NUM_THREADS="${OMP_NUM_THREADS-8}"

# ---- Ethernet: how ranks find each other ----

# Network interface, by its name in `ip -brief address` on a compute node, over which NCCL connects and gloo runs (the small
# all-reduce of each step). Needed if the first interface that is up does not reach the other nodes.
# export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME-ib0}"
# export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME-ib0}"

# ---- InfiniBand or RoCE: gradients and weights between nodes ----

# Adapters that NCCL may use, by their names in `ibstat -l`. Needed if a node also has adapters for storage or Ethernet.
# "=mlx5_0,mlx5_1" is exactly these two, "^mlx5_2" all but this one.
# export NCCL_IB_HCA="${NCCL_IB_HCA-=mlx5_0,mlx5_1,mlx5_2,mlx5_3}"
# Index in the adapter's GID table; RoCE only, usually 3 (RoCE v2 over IPv4). Leave it alone on InfiniBand.
# export NCCL_IB_GID_INDEX="${NCCL_IB_GID_INDEX-3}"
# InfiniBand service level, if the site has one for training traffic.
# export NCCL_IB_SL="${NCCL_IB_SL-0}"
# How long an adapter waits before it retransmits: 4.096 microseconds * 2^value. Raise it to 22 or 23 if large jobs fail
# with "transport retry counter exceeded".
# export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT-20}"
# 1 turns InfiniBand off: slow, but shows whether the fabric or the program is at fault.
# export NCCL_IB_DISABLE="${NCCL_IB_DISABLE-0}"
# GPUDirect RDMA is used between a GPU and an adapter that are at most so far apart: PIX (one PCIe switch), PXB (several),
# PHB (the CPU), SYS (across sockets). Without it NCCL decides.
# export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL-PXB}"

# ---- Logs, for when something hangs ----

# WARN: errors with their reason. INFO: also the adapters and paths that NCCL chose; read this once on a new cluster.
export NCCL_DEBUG="${NCCL_DEBUG-WARN}"
# With INFO: one file per process instead of the job's log; %h is the host, %p the process id.
# export NCCL_DEBUG_FILE="${NCCL_DEBUG_FILE-nccl-%h-%p.log}"
# PyTorch's flight recorder keeps the last collectives of each rank (BUFFER_SIZE of them). It writes them to TEMP_FILE
# followed by the rank when a collective exceeds its ten minutes or the watchdog ends the run: they show which rank was
# missing. The values below are the program's defaults, but its files are nccl-rank-N in the run folder's watchdog/. The
# names hold for torch 2.10 to 2.14.
# export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE-2000}"
# export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT-1}"
# export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE-/scratch/nccl-rank-}"
