"""The expert atlas: one HTML page, to be sent around, that shows what every expert does."""

from __future__ import annotations

from moee_analysis.atlas.page import write_atlas as write_atlas
