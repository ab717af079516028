"""Latency: cells that share model, data and batch are timed side by side."""
