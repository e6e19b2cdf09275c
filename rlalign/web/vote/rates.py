"""How often somebody may ask."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Rate:
    """A token bucket for each asker: ``burst`` requests at once, then ``per_second``.

    ``most`` askers are remembered, those who asked last; who is forgotten starts anew.
    """

    per_second: float
    burst: float
    clock: Callable[[], float] = time.monotonic
    most: int = 20_000
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def take(self, asker: str) -> float:
        """0.0 where the request may pass, else the seconds until one may."""
        now = self.clock()
        with self._lock:
            # what has come in since the last request
            left, at = self._left.pop(asker, (self.burst, now))
            left = min(self.burst, left + (now - at) * self.per_second)
            allowed = left >= 1.0
            self._left[asker] = (left - 1.0 if allowed else left, now)
            while len(self._left) > self.most:
                self._left.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self.per_second


def network_of(address: str) -> str:
    """What counts as one address: all of IPv4's, the first 64 bits of IPv6's, which is what one
    household has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    mapped = found.ipv4_mapped  # type: ignore[union-attr]
    if mapped is not None:
        return str(mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
