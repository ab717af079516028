"""Bytes from elsewhere: pictures, published data sets, checkpoints. Read safely, checked, never executed."""
