"""Optimizers whose step is that of the logical parameters, however tensor parallelism and ZeRO have cut them."""
