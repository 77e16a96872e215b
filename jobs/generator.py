"""Train the generator, after the teacher, and keep its checkpoints.

`python jobs/generator.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/generator.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["generator", *sys.argv[1:]]))
