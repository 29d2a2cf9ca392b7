"""`python -m moesvd_core ...` is `moesvd ...`."""

import sys

from moesvd_core.cli import main

sys.exit(main())
