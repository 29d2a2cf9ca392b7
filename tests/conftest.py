"""What holds for every test: no network, and threads that do not spin beside those of another test process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
