"""Nsight Systems' exports as rows of our tables: `export` reads files, `ranges` finds what was open when, `steps` puts
kernels into the steps, layers and ops of our NVTX ranges."""
