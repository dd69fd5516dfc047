"""``python -m moee_analysis`` is ``moee``."""

from __future__ import annotations

import sys

from moee_analysis.cli import main

sys.exit(main())
