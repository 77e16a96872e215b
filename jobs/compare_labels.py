"""Appendix D: the labelling strategies from one generator, after what they need.

`python jobs/compare_labels.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/compare_labels.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare-labels", *sys.argv[1:]]))
