"""The student as ONNX and a synthetic set as Parquet, after what they need.

`python jobs/export.py configs/x.yaml`, or
`ray job submit --working-dir . -- python jobs/export.py configs/x.yaml`.
"""

import sys

from kr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
