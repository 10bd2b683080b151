"""Debian's Chromium, which the machine has or has not: none is downloaded."""

import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
