"""Families of VLMs, one file each, named by the `model_type` of the checkpoint's config."""
