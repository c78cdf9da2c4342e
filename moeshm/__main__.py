"""`python -m moeshm`: the same as the command `moeshm`."""

from .cli import main

if __name__ == "__main__":
    main()
