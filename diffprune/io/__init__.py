"""Input and output of bytes: blob storage, images, published data sets, checkpoints. Checked when read, never executed."""
