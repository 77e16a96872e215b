"""Accuracy against leak of the methods that the configuration's section `frontier` names.

`python jobs/frontier.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/frontier.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["frontier", *sys.argv[1:]]))
