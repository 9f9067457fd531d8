"""Whether the Hugging Face hub answers: known in seconds, where its libraries retry for minutes.

offline_unless_reachable()      # before the first question to the hub
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PATIENCE_S = 3.0
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def offline_unless_reachable(patience_s: float = PATIENCE_S) -> None:
    """Put the hub's libraries offline, with a warning, where nothing answers at its address.

    They then take what an earlier run has downloaded, and say at once what is absent.
    """
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    why = unreachable(endpoint, patience_s)
    if why is None:
        return
    print(
        f"warning: the hub ({endpoint}) cannot be reached: {why}; only what was downloaded before "
        "can be used",
        file=sys.stderr,
    )
    stay_offline()


def stay_offline() -> None:
    """Keep the hub's libraries off the network, those that are loaded too."""
    for name in OFFLINE:
        os.environ[name] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):  # read at import
        if module in sys.modules:
            vars(sys.modules[module]).update(HF_HUB_OFFLINE=True)


def unreachable(endpoint: str, patience_s: float = PATIENCE_S) -> str | None:
    """Why no connection to a server, or to the proxy in front of it, could be made; None: it could.

    Resolving a name cannot be interrupted, so it is done aside and left behind when time is up.
    """
    address = _address(endpoint)
    if address is None:
        return "it is no address of the form https://HOST"
    outcome: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=patience_s).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error.strerror or str(error))

    aside = threading.Thread(target=connect, daemon=True)
    aside.start()
    aside.join(patience_s)
    return outcome[0] if outcome else f"no answer in {patience_s:g} s"


def _address(endpoint: str) -> tuple[str, int] | None:
    """Host and port of the server, or of its proxy where the environment names one."""
    try:
        url = urlsplit(endpoint)
        proxies = getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if proxy and url.hostname and not proxy_bypass(url.hostname):
            url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError:  # a port that is no number
        return None
    return (url.hostname, port) if url.hostname else None
