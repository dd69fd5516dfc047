"""``python -m moee_analysis.cli`` is ``moee``; torchrun starts it by this name."""

import sys

from moee_analysis.cli import main

sys.exit(main())
