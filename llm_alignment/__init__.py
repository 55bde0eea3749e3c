"""What the four training scripts and the evaluation share; one noun a file."""

import sys

if not (3, 11) <= sys.version_info[:2] < (3, 14):
    print(
        "error: Python 3.11, 3.12 or 3.13 is needed and this is {}.{}; make the environment with one of them, "
        "for example: poetry env use 3.12".format(*sys.version_info[:2]),
        file=sys.stderr,
    )
    raise SystemExit(2)
