"""
How fast one server is asked ([`Pace`]). A server that refuses requests because there are too many of them is not down:
it answers, and it is asked more slowly.
"""

import random
from time import monotonic


LONGEST_WAIT = 60.0  # seconds: a server that wants to be left alone for longer is not waited for, and tried after them
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds
_PATIENCE = 120.0  # seconds of pauses without one answer in between, after which a server is not waited for
_GROWTH = 0.1  # places that an answer adds at least, so that many places come back within some rounds


class Pace:
    """
    The places for requests at one server. There are `most` of them. A refusal for the rate halves the requests under
    way and begins a pause, as long as the server says. Each answer makes room for a little more. A server that refuses
    everything is tried every `seconds`. Used in the event loop only.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self.limit = float(most)
        self.under_way = 0
        self.period = 0  # counts the refusals that told something new
        self.resume = self.refused_at = float("-inf")
        self._wanted = float("-inf")  # when the server wants to be asked again, however late that is
        self.refusal = ""  # what the server said
        self._backoff = FIRST_BACKOFF
        self._again = False  # whether there was a refusal since the last answer
        self._in_vain = 0.0  # seconds of pauses since then

    @property
    def is_ready(self) -> bool:
        """Whether a request may be sent at once."""
        return self.under_way < int(self.limit) and monotonic() >= self.resume

    def is_worth_waiting(self, end: float) -> bool:
        """Whether a request that ends at `end` may still be answered."""
        now = monotonic()
        if now >= self.resume:  # all places are taken, so that somebody will find out
            return True
        return max(self.resume, self._wanted) < min(end, now + LONGEST_WAIT) and self._in_vain <= _PATIENCE

    def refused(self, period: int, delay: float | None, text: str) -> None:
        """A request that was sent in a period was refused for the rate. The server may name a delay."""
        self.refusal, self.refused_at = text, monotonic()
        if period == self.period:  # and not one more of many that were sent at the same time
            self.period += 1
            self.limit = max(1.0, min(self.limit, self.under_way) / 2)
            if delay is None or self._again:
                delay = max(delay or 0.0, self._backoff * random.uniform(0.75, 1))
                self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)
            self._again = True
            self._in_vain += delay
            if self._in_vain > _PATIENCE:
                delay = max(delay, self.seconds)
        if delay is not None:
            self.resume = max(self.resume, self.refused_at + min(delay, LONGEST_WAIT))
            self._wanted = self.refused_at + delay

    def answered(self, period: int) -> None:
        """A request that was sent in a period was answered."""
        self._again, self._in_vain, self._wanted = False, 0.0, float("-inf")
        if period == self.period and self.limit < self.most:
            self.limit = min(self.most, self.limit + max(1 / self.limit, _GROWTH))
        if period == self.period:
            self._backoff = max(self._backoff / 2, FIRST_BACKOFF)
