"""An endless loop in an answer ends with an error."""

import _thread
import contextlib
import signal
import threading
import time

LIMIT = 30  # seconds; a check of a right answer takes less than 10


class TooLong(BaseException):
    """A check took longer than LIMIT seconds. No `except Exception` of an answer catches it."""


@contextlib.contextmanager
def time_limit():
    """Raise TooLong in the body after LIMIT seconds. Only the main thread can be interrupted."""
    over = threading.Event()

    def stop():
        over.set()
        _thread.interrupt_main()

    timer = threading.Timer(LIMIT, stop)
    timer.daemon = True
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    ignored = in_main and not callable(handler)  # so it is in some jobs in the background
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if in_main:
        timer.start()
    try:
        yield
    except KeyboardInterrupt as error:
        if not over.is_set():
            raise  # that was the learner
        over.clear()
        raise TooLong().with_traceback(error.__traceback__) from None
    finally:
        timer.cancel()
        if over.is_set():  # the body ended in the same moment
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(0.1)
        if ignored:
            signal.signal(signal.SIGINT, handler)
