#!/usr/bin/env bash
# One run on Slurm's nodes: sbatch configs/clusters/slurm.sh configs/bloodmnist.yaml
# Needs kr_ray in the active Python environment of every node and a folder that all nodes share. After the time limit, a preemption or a
# failed node, the same command goes on where it stopped.
#SBATCH --job-name=kr_ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=${1:?usage: sbatch configs/clusters/slurm.sh CONFIG [--set KEY=VALUE ...]}
shift
shared=${KR_SHARED:-$SLURM_SUBMIT_DIR}
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs of a user may meet on a node

# Other users reach the ports of these nodes: without the token Ray would run their code.
umask 077
secrets=$(mktemp -d "$shared/.kr_ray.XXXXXX")
trap 'rm -rf "$secrets"' EXIT
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$secrets/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secrets/token

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 { print $1 }')

# Starts Ray on every node, runs the command on the first, and stops Ray when it ends.
srun --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
  ray symmetric-run --address "$head_ip:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$SLURM_GPUS_ON_NODE" --disable-usage-stats -- \
  python jobs/run.py "$config" --set cluster.address=auto --set "storage=$shared/runs" --set cluster.train.gpu=1 "$@"
