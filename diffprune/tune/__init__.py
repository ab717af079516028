"""From a target prefill speedup to a threshold or a count, verified by measuring."""
