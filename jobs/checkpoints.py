"""Find the checkpoint whose images teach best, after what it needs.

`python jobs/checkpoints.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/checkpoints.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["checkpoints", *sys.argv[1:]]))
