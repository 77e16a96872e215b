"""Train the final student on synthetic images, after what it needs.

`python jobs/student.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/student.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["student", *sys.argv[1:]]))
