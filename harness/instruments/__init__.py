"""What looks into a step: CUDA events, host timers, NVTX ranges. Each is an `engines.base.Probe`."""
