"""Runs the script that its first argument names as ``python SCRIPT ARGUMENTS...`` would, but for Python's own end.

Once torch 2.13 has made a DTensor, gloo's threads outlive ``destroy_process_group()``. One that then drops its last
tensor while Python ends aborts the process ("terminate called without an active exception"), whose work was done.
"""

import os
import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
runpy.run_path(sys.argv[0], run_name="__main__")  # what it raises ends this process as usual
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
