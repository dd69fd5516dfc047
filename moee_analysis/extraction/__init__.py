"""MoEE: record, cluster, cut experts, route."""
