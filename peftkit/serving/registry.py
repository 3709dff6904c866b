"""Adapters by name: those of the folders that were named at the start, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from peftkit.backbones.runs import MANIFEST
from peftkit.disk import file_sha256
from peftkit.errors import PeftkitError
from peftkit.serving.batching import Batcher
from peftkit.serving.resident import Adapter, Resident


class Registry:
    """What is served. A reload swaps adapters; requests that hold an older one finish with that."""

    def __init__(self, resident: Resident, folders: Mapping[str, Path]) -> None:
        self.resident, self.folders = resident, dict(folders)
        self._adapters: dict[str, Adapter] = {}

    def load(self) -> None:
        """Load every folder.

        Raises:
            PeftkitError: one that is no run, or over another backbone.
        """
        self._adapters = {name: self.resident.adopt(name, folder) for name, folder in self.folders.items()}

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def get(self, name: str) -> Adapter | None:
        """The adapter of this name, where there is one."""
        return self._adapters.get(name)

    def reload(self, batcher: Batcher) -> tuple[list[str], dict[str, str]]:
        """Load what has changed in its folder, one adapter after the other, between batches.

        Returns:
            The names of what was loaded; and what stays as it was because its folder cannot be loaded, with the reason.
        """
        loaded: list[str] = []
        kept: dict[str, str] = {}
        for name, folder in self.folders.items():
            try:
                if file_sha256(folder / MANIFEST) == self._adapters[name].sha256:
                    continue
                fresh = batcher.between(partial(self.resident.adopt, name, folder)).result()
            except (PeftkitError, OSError) as error:
                kept[name] = str(error)
                continue
            self._adapters = self._adapters | {name: fresh}
            loaded.append(name)
        return loaded, kept
