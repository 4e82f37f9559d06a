"""Growth of this process' resident memory while something runs."""

import ctypes
import gc
import sys
import threading

import psutil


class Memory:
    """Peak growth of the resident set inside a ``with``, in bytes, as a sampler every 2 ms sees it."""

    def __enter__(self):
        gc.collect()
        if sys.platform == "linux":  # freed memory that malloc keeps would hide what is taken anew
            ctypes.CDLL(None).malloc_trim(0)
        self._process, self._done, self.peak = psutil.Process(), threading.Event(), 0
        self._start = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss - self._start)

    def __exit__(self, *exc):
        self._done.set()
        self._thread.join()
