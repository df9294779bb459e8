"""``python -m ftrun.worker run.yaml``."""

import sys
from pathlib import Path

from ftrun.worker.main import main

if len(sys.argv) != 2:
    sys.exit("usage: python -m ftrun.worker RUN_FOLDER/run.yaml")
sys.exit(main(Path(sys.argv[1])))
