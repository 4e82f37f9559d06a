"""Memory that something takes while it runs."""

import ctypes
import gc
import sys
import threading

import psutil
import torch


class Memory:
    """Peak growth inside a ``with``, in bytes: of the GPU's allocations where there is one, else of the resident set.

    The resident set is sampled every 2 ms.
    """

    def __enter__(self):
        gc.collect()
        self.peak = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        if sys.platform == "linux":  # freed memory that malloc keeps would hide what is taken anew
            ctypes.CDLL(None).malloc_trim(0)
        self._process, self._done = psutil.Process(), threading.Event()
        self._start = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss - self._start)

    def __exit__(self, *exc):
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() - self._start
            return
        self._done.set()
        self._thread.join()
