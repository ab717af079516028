"""Accuracy: which cells a run asks, who answers which batch next, and the answers."""
