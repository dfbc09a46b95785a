# SPDX-License-Identifier: Apache-2.0
"""The bound on gradio's files, uploaded or made here: where they take too much, the oldest are deleted."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import gradio as gr
from limits import FILES_BYTES, FILES_SECONDS_SAFE


SECONDS_BETWEEN_LOOKS = 10


class FileStore:
    """The files of one app, as gradio lists them for its own cleaning, and uploads that are still coming."""

    def __init__(self, blocks: gr.Blocks, most: int = FILES_BYTES):
        self.blocks = blocks
        self.most = most
        self.coming = 0  # bytes
        self.lock = threading.Lock()

    @contextmanager
    def reserve(self, length: int) -> Iterator[None]:
        """Room for an upload of so many bytes, while it comes."""
        with self.lock:
            self.coming += length
        try:
            yield
        finally:
            with self.lock:
                self.coming -= length

    def make_room(self) -> bool:
        """Delete the oldest files until the rest fit, with what is coming; whether they do.

        Files that were just written stay: someone may be about to load them.
        """
        with self.lock:
            files = sorted(self._files())
            taken = self.coming + sum(size for _, size, _ in files)
            for written, size, path in files:
                if taken <= self.most or written > time.time() - FILES_SECONDS_SAFE:
                    break
                self._delete(path)
                taken -= size
            return taken <= self.most

    def watch(self) -> None:
        """Make room now and then: what the page shows and gives away is written without asking."""
        threading.Thread(target=self._watch, daemon=True, name="files").start()

    def _watch(self) -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.make_room()

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """When each was written, its bytes, its path; without what belongs to the page."""
        listed = {path for paths in self.blocks.temp_file_sets for path in paths.copy()}
        for path in listed.difference(*(block.keep_in_cache for block in components_of(self.blocks))):
            try:
                status = os.stat(path)
            except OSError:  # deleted already
                self._forget(path)
            else:
                yield status.st_mtime, status.st_size, path

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.remove(path)
        self._forget(path)

    def _forget(self, path: str) -> None:
        for paths in self.blocks.temp_file_sets:
            paths.discard(path)


def components_of(blocks: gr.Blocks) -> list[gr.components.Component]:
    """All components of an app."""
    return [block for block in blocks.blocks.values() if isinstance(block, gr.components.Component)]
