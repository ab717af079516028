"""The way in from a shell: one command, a verb each. Modules are imported late, so that `--help` does not wait for torch."""
