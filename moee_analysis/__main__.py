"""``python -m moee_analysis`` is ``moee``."""

import sys

from moee_analysis.cli import main

sys.exit(main())
