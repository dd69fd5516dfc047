"""The hub of pretrained weights: asked where it answers, else only its cache on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants as hub


@contextmanager
def hub_access() -> Iterator[None]:
    """While open, the hub's client looks in its cache alone if the hub cannot be reached."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not _hub_answers()
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    """Whether the hub can be reached; saves its client a minute of retries when it cannot."""
    if getproxies():
        return True
    try:
        socket.create_connection((urlsplit(hub.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True
