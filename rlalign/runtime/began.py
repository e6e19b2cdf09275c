"""When this process was first asked for anything of this room; the first thing that the room
imports."""

from __future__ import annotations

import time

BEGAN = time.time()
"""Seconds since the epoch. Ray starts processes ahead of need: from here on one knows what it is
for, and loads."""
