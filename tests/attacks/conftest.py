"""Lets the modules of this folder, and the builders of small caches, find each other."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "cache"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
