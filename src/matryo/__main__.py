"""`python -m matryo`."""

from matryo.cli import main

if __name__ == "__main__":
    main()
