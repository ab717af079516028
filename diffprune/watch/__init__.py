"""A run one can watch: what it has done and found so far, as a page and in a terminal, from a small file that its driver keeps."""
