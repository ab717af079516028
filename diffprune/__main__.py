"""`python -m diffprune`, and the `diffprune` command."""

from diffprune.cli.commands import main

if __name__ == "__main__":
    main()
