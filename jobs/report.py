"""Report on what has finished so far; trains nothing.

`python jobs/report.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/report.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
