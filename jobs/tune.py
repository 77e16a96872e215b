"""Tune latent std, regeneration rate and cardinality scale, after what they need.

`python jobs/tune.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/tune.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
