"""A report in numbers, for programs: summary, gates, JUnit, and what changed since another one."""
