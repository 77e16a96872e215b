"""Figure 3: CAS of every checkpoint for generators and labellings from one teacher, after what they need.

`python jobs/compare.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/compare.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
