"""`python -m guestpass` is the `guestpass` command."""

import sys

from guestpass.cli import main

if __name__ == "__main__":
    sys.exit(main())
