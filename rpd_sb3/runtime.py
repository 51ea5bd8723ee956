"""Acts as an exported policy, with numpy and onnxruntime alone: ``from rpd_sb3.runtime import load``."""

import sys

from rpd_sb3.export.runtime import *  # noqa: F403
from rpd_sb3.export.runtime import main

if __name__ == "__main__":
    sys.exit(main())
