"""`python -m gdpd.cli`, the same as the command `gdpd`."""

import sys

from gdpd.cli import main

if __name__ == "__main__":
    sys.exit(main())
