"""`python -m lightning_modules` is the `lightning` command, also where another package owns that script."""

from lightning_modules.cli import main

if __name__ == "__main__":
    main()
