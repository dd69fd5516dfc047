"""Files and folders that are whole or absent, and the content-keyed store."""
