"""The rendered data set that is bundled."""
