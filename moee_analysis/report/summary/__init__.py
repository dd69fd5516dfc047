"""A report in numbers, for programs: summary, gates, and what changed since another one."""
