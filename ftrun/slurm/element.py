"""What SLURM starts for an element of an array.

python -m ftrun.slurm.element LIST INDEX
"""

from __future__ import annotations

import sys


def main(list_file: str, index: str) -> int:
    """Do an element's run, having caught signals before the imports, which take a while."""
    from ftrun.slurm.told import Told

    told = Told()
    from ftrun.slurm import job

    return job.do(list_file, int(index), told)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
