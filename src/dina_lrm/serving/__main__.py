"""`python -m dina_lrm.serving`: the same as `dina-lrm serve`."""

import sys

from dina_lrm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
