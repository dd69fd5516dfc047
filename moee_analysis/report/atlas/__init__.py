"""The expert atlas: one HTML page, to be sent around, that shows what every expert does.

The page is plain JavaScript without a build step: it has to work from a file, where modules cannot
be loaded, and is too small for a framework.
"""

from __future__ import annotations

from moee_analysis.report.atlas.page import write_atlas as write_atlas
