"""Halving over the checkpoints against the exhaustive sweep, after what they need.

`python jobs/compare_search.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/compare_search.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare-search", *sys.argv[1:]]))
