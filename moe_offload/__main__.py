"""`python -m moe_offload`: the command line, see cli.py."""

import sys

from moe_offload.cli import main

if __name__ == "__main__":
    sys.exit(main())
