"""Timed requests: clocks, modes (eager, CUDA graph), sessions of interleaved variants, FLOPs and rooflines."""
