"""``python -m jaxserve.bench gpu``."""

import sys

from jaxserve.bench.gpu import main

if __name__ == "__main__":
    if sys.argv[1:2] != ["gpu"]:
        sys.exit("usage: python -m jaxserve.bench gpu [OPTIONS]; --help lists them")
    sys.exit(main(sys.argv[2:]))
