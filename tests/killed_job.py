"""``jaxserve`` with faults armed.

python killed_job.py SPEC finetune MODEL DATA ...
"""

import sys

from jaxserve import faults
from jaxserve.cli import main

if __name__ == "__main__":
    faults.arm(sys.argv[1])
    main(sys.argv[2:])
