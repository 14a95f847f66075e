"""``python -m sdegen``."""

import sys

from sdegen.cli import main

if __name__ == "__main__":
    sys.exit(main())
