"""`python -m compresskit_cli` is the `compresskit` command."""

from compresskit_cli.app import main

if __name__ == "__main__":
    main()
