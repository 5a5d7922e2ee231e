"""
The event loop of the judges that ask servers: one per process, in one daemon thread, shared by all judges. Connections
belong to an event loop, so a loop per batch would open them anew, and notebooks have a loop that runs already.

After a fork the child has no such thread and must not use the connections: it starts its own loop.
"""

import asyncio
import os
import selectors
import threading
import weakref
from typing import Any


_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_selector: selectors.BaseSelector | None = None
_owned: weakref.WeakSet[Any] = weakref.WeakSet()  # what must not be closed by a forked child
_inherited: list[Any] = []


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process, running in its thread."""
    global _loop, _selector
    with _lock:
        if _loop is None:
            _selector = selectors.DefaultSelector()
            _loop = asyncio.SelectorEventLoop(_selector)
            threading.Thread(target=_loop.run_forever, name="trl_sgpo judges", daemon=True).start()
        return _loop


def own(connection: Any) -> None:
    """Says of an object that holds connections of the background loop that a forked child must not let go of it."""
    _owned.add(connection)


def close_in_background(connection: Any, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """Closes a session of the background loop, from any thread. For `weakref.finalize`, so that it runs at exit too."""
    if pid != os.getpid() or loop.is_closed():
        return
    try:
        if asyncio.get_running_loop() is loop:  # a garbage collection in the loop's own thread
            loop.call_soon(lambda: loop.create_task(connection.close()))
            return
    except RuntimeError:
        pass
    work = connection.close()
    try:
        asyncio.run_coroutine_threadsafe(work, loop).result(timeout=0.5)
    except Exception:
        work.close()


def _after_fork() -> None:
    global _lock, _loop, _selector
    _lock = threading.Lock()  # another thread of the parent may have held it
    if _selector is not None:
        _inherited.extend([_loop, *_owned])
        # Parent and child share one epoll object, and a connection that is closed here would be struck off for both
        _selector.close()
    _loop = _selector = None


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
