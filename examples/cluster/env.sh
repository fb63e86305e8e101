# shellcheck shell=bash
# The environment of every rank on a GPU cluster. Sourced by the recipes here; change it for your network first.
# `.deepspeed_env` holds the same values for `deepspeed`, whose reader takes neither comments nor empty lines.

# What NCCL prints: WARN says why it fails; INFO also which interface and which path it chose (for the first run).
export NCCL_DEBUG=WARN

# The interface by which NCCL's ranks find each other, and over which they talk where there is no InfiniBand.
# A list of prefixes; "=eth0" is exactly that one, "^docker,lo" all but these. `ip -brief addr` lists them.
# Unset, NCCL takes the first that is neither loopback nor docker, which on a machine with several may be the wrong one.
export NCCL_SOCKET_IFNAME=eth0

# The InfiniBand or RoCE cards for the traffic itself, again by prefix: "mlx5" is all of them. "mlx5_1" is also mlx5_10,
# so name single cards as "=mlx5_1:1" (card:port). `ibstat` lists them. Delete the line where there are none.
export NCCL_IB_HCA=mlx5

# The same for gloo, which carries what is not on a GPU (and everything on a CPU cluster). One exact name.
# Unset, gloo takes the address that the host's own name resolves to: often 127.0.1.1, which no other host reaches.
export GLOO_SOCKET_IFNAME=eth0

# Threads of each rank on the CPU: cores / ranks of a machine. torchrun would set 1 otherwise.
export OMP_NUM_THREADS=8

# Left alone on purpose:
#   TORCH_NCCL_ASYNC_ERROR_HANDLING   a failed collective ends the process (3, the default); 0 would let it hang
#   TORCH_NCCL_BLOCKING_WAIT          makes the host wait in each collective: slower, and gives no better message
#   NCCL_P2P_DISABLE, NCCL_ALGO, …    NCCL's own choices; its documentation says to set them for debugging only
