"""Triton kernels, one file an operator: forward, backward and launch choice. Installed as `fastpeft.kernels`."""
