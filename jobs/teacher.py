"""Train the teacher on the real images.

`python jobs/teacher.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/teacher.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["teacher", *sys.argv[1:]]))
