"""The VLM that ships with the package: its procedural world, its weights, and how both were made."""
