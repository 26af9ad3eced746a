"""`python -m mlmdsl` is the command `mlmdsl`."""

from mlmdsl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
