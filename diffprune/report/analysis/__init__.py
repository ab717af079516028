"""Figures computed from records: accuracies, differences, speedups, with their intervals."""
