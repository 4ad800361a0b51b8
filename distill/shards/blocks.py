"""The bytes of a shard: blocks of texts as WebDataset samples in a plain ustar tar.

The encoding of given content is unique, headers and padding included, so a tar that differs from it in any way (a link, a
pickled array, a path, a further member) is refused. `encode_block` writes it and `scan` reads it; `inspect` checks every byte.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.run.files import seal, unseal
from distill.shards.format import ShardError, tar_name

MEMBERS = ("embedding.npy", "hash.npy", "json", "offset.npy", "source.npy", "txt")
DIGESTED = ("embedding.npy", "hash.npy", "offset.npy", "source.npy", "txt")
SOURCE = "source.npy"  # only where there are several sources, or one with a role
TRANSLATION = re.compile(r"translation([0-9]{2})\.(?:offset\.npy|txt)")  # between SOURCE and txt, of columns with any text
NPY_HEADER = 128
Int64 = NDArray[np.int64]


class Span(NamedTuple):
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The layout of one tar. Arrays are [num_blocks] byte positions of the data, behind any npy header; sources: or None.

    translations: of each column, the positions of its offsets and of its texts, -1 in blocks that have none.
    """

    rows: int
    dim: int
    block_rows: int
    teacher_fingerprint: str
    text_fingerprint: str
    embeddings: Int64
    hashes: Int64
    offsets: Int64
    texts: Int64
    sources: Int64 | None
    translations: dict[int, tuple[Int64, Int64]]


class _Block(NamedTuple):
    spans: dict[str, Span]
    about: dict[str, Any]
    dim: int
    end: int


def encode_block(
    shard: int,
    block: int,
    texts: Sequence[str],
    hashes_n: Int64,
    vectors_nd: NDArray[np.float16],
    sources_n: NDArray[np.uint16] | None = None,
    translations: Sequence[Sequence[str]] = (),
    *,
    teacher_fingerprint: str,
    text_fingerprint: str,
) -> bytes:
    """The tar bytes of one block, its members in the order of their names.

    translations: [n] for each column from 1 on, '' for a text without one; a column without any takes no bytes.
    """
    where = f"{tar_name(shard)}: block {block}"
    data = {"embedding.npy": _npy("<f2", vectors_nd), "hash.npy": _npy("<i8", hashes_n)}
    data["offset.npy"], data["txt"] = _text_members(texts, where)
    for column, translated in enumerate(translations, start=1):
        if any(translated):
            data[_offset_name(column)], data[_text_name(column)] = _text_members(translated, where)
    if sources_n is not None:
        data[SOURCE] = _npy("<u2", sources_n)
    about = {
        "rows": len(texts),
        "sha256": {member: hashlib.sha256(content).hexdigest() for member, content in data.items()},
        "shard": shard,
        "teacher": teacher_fingerprint,
        "text": text_fingerprint,
    }
    data["json"] = seal(about)
    parts: list[bytes] = []
    for member in sorted(data):
        size = len(data[member])
        parts += [_tar_header(_name(shard, block, member), size), data[member], bytes(-size % tarfile.BLOCKSIZE)]
    return b"".join(parts)


def tar_end(size: int) -> bytes:
    """The zeros that end a tar of `size` bytes so far: two empty blocks, filled up to a whole record."""
    return bytes(1024 + -(size + 1024) % tarfile.RECORDSIZE)


def open_map(path: Path) -> mmap.mmap:
    """A read-only memory map. Raises ShardError if the file is missing or shorter than any tar."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < tarfile.RECORDSIZE:
                raise ShardError(f"{path.name}: truncated, it has {path.stat().st_size} bytes")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ShardError(f"{path.name}: missing") from None


def scan(data: mmap.mmap, index: int) -> ShardIndex:
    """The layout of shard `index`, from headers and block JSON, without reading texts or vectors.

    Raises ShardError naming the block and member that differs from what `encode_block` writes.
    """
    blocks = list(_walk(data, index))
    rows = [block.about["rows"] for block in blocks]
    first = blocks[0]
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        if block.dim != first.dim or block.about["rows"] > rows[0] or (block.about["rows"] < rows[0] and not last):
            raise ShardError(
                f"{_where(index, number, 'json')}: {rows[number]} rows of {block.dim}, unlike the blocks before it"
            )
        if (SOURCE in block.spans) != (SOURCE in first.spans):
            raise ShardError(f"{_where(index, number, SOURCE)}: it is in some blocks and not in others")
        if any(block.about[key] != first.about[key] for key in ("teacher", "text")):
            raise ShardError(f"{_where(index, number, 'json')}: made by another teacher or from another text than block 0")

    def starts(member: str, header: int) -> Int64:
        return np.array([block.spans[member].start + header for block in blocks], dtype=np.int64)

    def starts_if_any(member: str, header: int) -> Int64:
        return np.array([block.spans[member].start + header if member in block.spans else -1 for block in blocks], np.int64)

    columns = sorted({int(match[1]) for block in blocks for member in block.spans if (match := TRANSLATION.fullmatch(member))})
    return ShardIndex(
        rows=sum(rows),
        dim=first.dim,
        block_rows=rows[0],
        teacher_fingerprint=first.about["teacher"],
        text_fingerprint=first.about["text"],
        embeddings=starts("embedding.npy", NPY_HEADER),
        hashes=starts("hash.npy", NPY_HEADER),
        offsets=starts("offset.npy", NPY_HEADER),
        texts=starts("txt", 0),
        sources=starts(SOURCE, NPY_HEADER) if SOURCE in first.spans else None,
        translations={
            column: (starts_if_any(_offset_name(column), NPY_HEADER), starts_if_any(_text_name(column), 0))
            for column in columns
        },
    )


def inspect(data: mmap.mmap, index: int) -> ShardIndex:
    """`scan`, and the sha256 of every member against its block's JSON: together they cover every byte of the tar."""
    for number, block in enumerate(_walk(data, index)):
        for member in block.about["sha256"]:
            span = block.spans[member]
            if hashlib.sha256(memoryview(data)[span.start : span.stop]).hexdigest() != block.about["sha256"][member]:
                raise ShardError(f"{_where(index, number, member)}: its bytes are not those that were written (sha256)")
    return scan(data, index)


def count_translations(data: mmap.mmap, index: ShardIndex) -> dict[tuple[int, int], int]:
    """(number of a source, column) -> the number of its texts that have a translation there."""
    counts: Counter[tuple[int, int]] = Counter()
    lengths = np.diff([*range(0, index.rows, index.block_rows), index.rows]).tolist()
    for column, (offsets, _) in index.translations.items():
        for block, length in enumerate(lengths):
            if offsets[block] < 0:
                continue
            has_text = np.diff(np.frombuffer(data, "<u4", length + 1, offsets[block])) > 1  # than its line break
            sources = np.zeros(length, "<u2")
            if index.sources is not None:
                sources = np.frombuffer(data, "<u2", length, index.sources[block])
            found = np.bincount(sources[has_text])
            counts.update({(number, column): int(found[number]) for number in np.flatnonzero(found).tolist()})
    return dict(counts)


def block_vectors(data: mmap.mmap, index: ShardIndex) -> list[NDArray[np.float16]]:
    """Views [n, d] of the stored vectors, block by block."""
    lengths = np.diff([*range(0, index.rows, index.block_rows), index.rows]).tolist()
    return [
        np.frombuffer(data, "<f2", length * index.dim, start).reshape(length, index.dim)
        for length, start in zip(lengths, index.embeddings.tolist(), strict=True)
    ]


def _walk(data: mmap.mmap, index: int) -> Iterator[_Block]:
    position, number = 0, 0
    while number == 0 or any(data[position : position + tarfile.BLOCKSIZE]):
        block = _read_block(data, index, number, position)
        yield block
        position, number = block.end, number + 1
    if data[position:] != tar_end(position):
        raise ShardError(f"{tar_name(index)}: block {number}: something other than the end follows the last block")


def _read_block(data: mmap.mmap, index: int, number: int, position: int) -> _Block:
    spans: dict[str, Span] = {}
    for member in MEMBERS:
        if member == SOURCE and not _is_named(data, index, number, member, position):
            continue
        while member == "txt" and TRANSLATION.fullmatch(name := _name_at(data, index, number, position)):
            if name <= max(spans):
                raise ShardError(f"{_where(index, number, name)}: it is there twice, or in the wrong place")
            spans[name], position = _read_member(data, index, number, name, position)
        spans[member], position = _read_member(data, index, number, member, position)
    about = _read_about(data[slice(*spans["json"])], _where(index, number, "json"), index)
    if about["sha256"].keys() != spans.keys() - {"json"}:
        raise ShardError(f"{_where(index, number, 'json')}: it describes other members than the block has")
    rows = about["rows"]
    dim = (spans["embedding.npy"].stop - spans["embedding.npy"].start - NPY_HEADER) // (2 * rows)
    shapes = {"embedding.npy": ("<f2", (rows, dim)), "hash.npy": ("<i8", (rows,))}
    shapes |= {member: ("<u4", (rows + 1,)) for member in spans if member.endswith("offset.npy")}
    if SOURCE in spans:
        shapes[SOURCE] = ("<u2", (rows,))
    for member, (dtype, shape) in shapes.items():
        span = spans[member]
        size = NPY_HEADER + np.dtype(dtype).itemsize * int(np.prod(shape))
        if data[span.start : span.start + NPY_HEADER] != _npy_header(dtype, shape) or span.stop - span.start != size:
            raise ShardError(
                f"{_where(index, number, member)}: not a plain {dtype} array of shape {shape} (pickled or foreign)"
            )
    texts = {member.removesuffix("txt") for member in spans if member.endswith("txt")}
    if texts != {member.removesuffix("offset.npy") for member in spans if member.endswith("offset.npy")}:
        raise ShardError(f"{_where(index, number, 'txt')}: a column of translations lacks its offsets or its texts")
    for column in texts:
        offset, text = spans[f"{column}offset.npy"], spans[f"{column}txt"]
        edges = np.frombuffer(data, "<u4", rows + 1, offset.start + NPY_HEADER)[[0, -1]].tolist()
        if edges != [0, text.stop - text.start]:
            raise ShardError(f"{_where(index, number, f'{column}offset.npy')}: it does not span the text")
        if column and edges[-1] == rows:
            raise ShardError(f"{_where(index, number, f'{column}txt')}: it has no text, and is left out then")
    return _Block(spans, about, dim, position)


def _read_member(data: mmap.mmap, index: int, number: int, member: str, position: int) -> tuple[Span, int]:
    """The content of the member at `position`, and the position of the next one."""
    span = _read_header(data, index, number, member, position)
    end = span.stop + -span.stop % tarfile.BLOCKSIZE
    if any(data[span.stop : end]):
        raise ShardError(f"{_where(index, number, member)}: the padding behind it is not zero")
    return span, end


def _name_at(data: mmap.mmap, index: int, number: int, position: int) -> str:
    """The name in the header at `position`, without the block's; '' for a name of another block."""
    name, prefix = data[position : position + 100].partition(b"\0")[0], _name(index, number, "").encode()
    return name.removeprefix(prefix).decode("ascii", "replace") if name.startswith(prefix) else ""


def _is_named(data: mmap.mmap, index: int, number: int, member: str, position: int) -> bool:
    """Whether the header at `position` begins with a member's name."""
    name = _name(index, number, member).encode() + b"\0"
    return data[position : position + len(name)] == name


def _read_header(data: mmap.mmap, index: int, number: int, member: str, position: int) -> Span:
    raw = data[position : position + tarfile.BLOCKSIZE]
    name, where = _name(index, number, member), _where(index, number, member)
    try:
        info = tarfile.TarInfo.frombuf(raw, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ShardError(f"{where}: its tar header is damaged or cut off ({error})") from None
    if info.name != name:
        hint = "an unsafe path" if info.name.startswith("/") or ".." in info.name.split("/") else "a renamed or foreign shard"
        raise ShardError(f"{where}: in its place is a member named {info.name!r}, not {name!r}: {hint}")
    if info.type != tarfile.REGTYPE:
        raise ShardError(f"{where}: it is a link, device or folder, not a plain file")
    if info.size < 0 or raw != _tar_header(name, info.size):
        raise ShardError(f"{where}: its tar header is not as it was written")
    span = Span(position + tarfile.BLOCKSIZE, position + tarfile.BLOCKSIZE + info.size)
    if span.stop > len(data):
        raise ShardError(f"{where}: truncated, {span.stop} bytes are needed and the file has {len(data)}")
    return span


def _read_about(raw: bytes, where: str, index: int) -> dict[str, Any]:
    try:
        about = unseal(raw)
    except ValueError as error:
        raise ShardError(f"{where}: {error}") from None
    digests = about.get("sha256")
    well_formed = (
        about.keys() == {"rows", "sha256", "shard", "teacher", "text"}
        and type(about["rows"]) is int
        and about["rows"] > 0
        and isinstance(digests, dict)
        and {member for member in digests if not TRANSLATION.fullmatch(member)} | {SOURCE} == set(DIGESTED)
    )
    if not well_formed:
        raise ShardError(f"{where}: not the description of a block")
    if about["shard"] != index:
        raise ShardError(f"{where}: it belongs to shard {about['shard']}: a renamed shard")
    return about


def _text_members(texts: Sequence[str], where: str) -> tuple[bytes, bytes]:
    """The members of a block's texts: offsets, and the texts as lines."""
    lines = [_line(text, f"{where}, text {row}") for row, text in enumerate(texts)]
    ends = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    if ends[-1] >= 2**32:
        raise ValueError(f"a block of {len(texts)} texts has {ends[-1]} bytes of text; use a smaller shards.block_rows")
    return _npy("<u4", ends), b"".join(lines)


def _offset_name(column: int) -> str:
    return f"translation{column:02d}.offset.npy"


def _text_name(column: int) -> str:
    return f"translation{column:02d}.txt"


def _line(text: str, where: str) -> bytes:
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode: {error}") from None


def _npy(dtype: str, array: NDArray[Any]) -> bytes:
    return _npy_header(dtype, array.shape) + array.astype(dtype).tobytes()


@lru_cache(64)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    # numpy's writer pads differently by version; these bytes never change, and np.load reads them
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode("ascii")
    return b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little") + text.ljust(NPY_HEADER - 11) + b"\n"


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _name(shard: int, block: int, member: str) -> str:
    return f"{shard:06d}-{block:06d}.{member}"


def _where(index: int, block: int, member: str) -> str:
    return f"{tar_name(index)}: block {block}, member {member}"
