"""GPU kernels in Triton, one file per family of ops. Installed as `fastrlhf.kernels`; imported only on CUDA."""
