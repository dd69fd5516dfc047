"""The MoE layer: experts, routers, and how they are computed."""
