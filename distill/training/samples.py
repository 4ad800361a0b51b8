"""The training samples of a shard set: its texts, and of parallel text also their translations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill.run.prompts import Role
from distill.shards import ShardReader


class Samples:
    """Samples by number: column x texts of the set + row, so that without parallel text a sample is a row.

    Column 0 is the text that the teacher has read, column k its k-th translation; all samples of a row have its vector and its
    hash. Methods take numbers [n].
    """

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        sources = reader.manifest.sources
        self.names = [[f"{source.name} {column}" for column in source.columns] or [source.name] for source in sources]
        """Of each source of the texts, of parallel text for each of its columns."""
        flat = [name for names in self.names for name in names]
        self.source_names = flat if len(flat) > 1 else []
        """Of the sources of the samples, each column being one, by their numbers; [] where there are not several."""
        self._first = np.cumsum([0, *map(len, self.names)])

    def __len__(self) -> int:
        """The numbers that there are, with those of missing translations, whose text is ''."""
        return len(self.reader) * self.reader.num_columns

    def rows(self, samples: np.ndarray) -> np.ndarray:
        return samples % len(self.reader)

    def columns(self, samples: np.ndarray) -> np.ndarray:
        return samples // len(self.reader)

    def texts(self, samples: np.ndarray) -> list[str]:
        return self.reader.texts(self.rows(samples), self.columns(samples))

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """The UTF-8 bytes of each text, int64."""
        return self.reader.lengths(self.rows(samples), self.columns(samples))

    def roles(self, samples: np.ndarray) -> list[Role | None]:
        return self.reader.roles(self.rows(samples))

    def vectors(self, samples: np.ndarray) -> np.ndarray:
        """[n, d] float16."""
        return self.reader.vectors(self.rows(samples))

    def hashes(self, samples: np.ndarray) -> np.ndarray:
        """[n] int64."""
        return self.reader.hashes(self.rows(samples))

    def sources(self, samples: np.ndarray) -> Tensor | None:
        """The number of each sample's source, [n] int64; None where there are not several."""
        if not self.source_names:
            return None
        return torch.from_numpy(self._first[self.reader.sources(self.rows(samples))] + self.columns(samples))
