"""The whole pipeline, from real images to the report.

`python jobs/run.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/run.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
