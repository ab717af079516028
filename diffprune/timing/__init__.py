"""Timed requests: clocks, modes (eager, CUDA graph), sessions of interleaved arms, FLOPs and rooflines."""
