"""Students of more and more synthetic images, without and with the real ones, after what they need.

`python jobs/scaling.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/scaling.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["scaling", *sys.argv[1:]]))
