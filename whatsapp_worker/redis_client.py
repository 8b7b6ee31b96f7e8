"""How this package connects to Redis."""

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry


def connect(url: str, *, timeout_s: float = 5.0) -> "Redis":
    """A client that never repeats a command by itself; nothing is sent yet.

    redis-py retries up to ten times by default, BLMOVE included: a reply that was lost then pops
    a second job and strands the first. Whoever calls knows what may be repeated.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        timeout_s: Longest wait for a connection, and for one answer.
    """
    return Redis.from_url(
        url,
        protocol=2,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        driver_info=None,  # it reads its own version off the disk for every connection
    )
