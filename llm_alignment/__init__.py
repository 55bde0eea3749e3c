"""What the four training scripts and the evaluation share; one noun a file."""

import os
import sys

if not (3, 11) <= sys.version_info[:2] < (3, 14):
    print(
        "error: Python 3.11, 3.12 or 3.13 is needed and this is {}.{}; make the environment with one of them, "
        "for example: poetry env use 3.12".format(*sys.version_info[:2]),
        file=sys.stderr,
    )
    raise SystemExit(2)

# TRL reports every run to the hub from a thread of its own, which looks up the host's name while accelerate rewrites
# the environment. In C that is not safe: the process can end in a segmentation fault (seen in getenv).
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
