"""``python -m ftrun.worker run.yaml``: the run; with the name and the options of a task behind it, that task."""

import sys

from ftrun.worker.main import main

if not 2 <= len(sys.argv) <= 4:
    sys.exit("usage: python -m ftrun.worker RUN_FOLDER/run.yaml [TASK [OPTIONS_AS_JSON]]")
sys.exit(main(*sys.argv[1:]))
