"""OpenCV, imported so that this process's environment stays as it is."""

import os

from ns.core.process import set_environment

# Its loader puts a folder into LD_LIBRARY_PATH, where every child process would look for libraries.
with set_environment({"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}):
    import cv2

__all__ = ["cv2"]
