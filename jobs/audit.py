"""Attack teacher and student with shadow models, after what the attack needs.

`python jobs/audit.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/audit.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
