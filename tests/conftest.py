"""Settings for every test: no hub, no telemetry, no growing thread pools on small machines."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("WANDB_MODE", "offline")

from hypothesis import settings  # noqa: E402  (the environment comes first)

# The machines that run this are shared and slow at times; a deadline would only measure them.
settings.register_profile("capfilt", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("capfilt")
