"""Experiment trackers that hear what a run finds while it works: TensorBoard always, W&B and MLflow where a job asks for them."""
