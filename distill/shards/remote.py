"""Remote shard sets, downloaded into a local cache shard by shard, each verified against the manifest's checksum.

Any URL of an installed fsspec file system: s3://, gs://, hf://, http://, memory:// ...
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from pathlib import Path
from typing import Any

from distill.run.files import publish, sha256_of
from distill.shards.format import MANIFEST, MOMENTS, Manifest, ShardEntry, ShardError


def is_remote(place: str | Path) -> bool:
    return "://" in str(place) or str(place).startswith("pipe:")


class Remote:
    """A finished set at `url`, cached in `folder` inside `cache`. Several processes may share a cache.

    Raises ValueError unless `url` is a plain URL of a file system (no `pipe:`, no chain), ShardError if a file is not found.
    """

    def __init__(self, url: str, cache: str | Path) -> None:
        import fsspec

        protocol = url.partition("://")[0]
        if "::" in url or protocol not in fsspec.available_protocols():
            known = "a plain URL of a file system that fsspec knows (pipe: and chained URLs are refused)"
            raise ValueError(f"{url!r} is not {known}")
        try:
            self._system, self._root = fsspec.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError, OSError) as error:
            raise ValueError(f"cannot open {url}: {error}") from None
        self.url = url
        self.folder = Path(cache) / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def download_manifest(self) -> Manifest:
        """Downloads the current manifest and its moments. They replace those in the cache only if they are valid."""
        where = f"{self.url}/{MANIFEST}"
        try:
            with self._open(MANIFEST) as source:
                raw = source.read()
            manifest = Manifest.parse(raw)
        except ValueError as error:
            raise ShardError(f"{where}: {error}") from None
        self._download(MOMENTS, manifest.moments_sha256)
        with publish(self.folder / MANIFEST) as file:
            file.write(raw)
        return manifest

    def download(self, entry: ShardEntry) -> None:
        """Downloads the shard unless it is cached. Raises ShardError if it is not the one that the manifest lists."""
        path = self.folder / entry.name
        with (self.folder / f".{entry.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that the ranks of a node download a shard once
            if not path.exists() or path.stat().st_size != entry.bytes:
                self._download(entry.name, entry.sha256)

    def drop(self, entry: ShardEntry) -> None:
        (self.folder / entry.name).unlink(missing_ok=True)

    def _open(self, name: str) -> Any:
        try:
            return self._system.open(f"{self._root}/{name}", "rb")
        except FileNotFoundError:
            raise ShardError(f"{self.url}/{name}: there is no such file") from None

    def _download(self, name: str, sha256: str) -> None:
        with self._open(name) as source, publish(self.folder / name) as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            if sha256_of(Path(target.name)) != sha256:
                raise ShardError(
                    f"{self.url}/{name}: not the file that the manifest lists (sha256):"
                    " it was damaged there or during the download"
                )
