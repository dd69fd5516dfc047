"""The expert atlas: one HTML page, to be sent around, that shows what every expert does."""

from moee_analysis.report.atlas.page import write_atlas as write_atlas
