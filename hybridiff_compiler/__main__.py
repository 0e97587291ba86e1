"""`python -m hybridiff_compiler`: the command line, where the `hybridiff` script is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
