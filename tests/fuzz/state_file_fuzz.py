"""Saved states as files: whatever a file holds, it is read or refused with a reason, and the model goes on unharmed.

    python tests/fuzz/state_file_fuzz.py FOLDER... [libFuzzer's options]

An input is a list of changes of a file that the model has saved. Half of the inputs have the hash of what they changed
made right again, since nothing else would get behind it.
"""

import contextlib
import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "python")]

FIELDS = ("model", "kv_type", "block_tokens", "block_bytes", "n_tokens", "n_blocks", "data")


class Bytes:
    """An input as decisions; zeros when it has ended."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        part = self.data[self.at : self.at + n]
        self.at += n
        return part.ljust(n, b"\0")

    def below(self, n: int) -> int:
        return self.take(1)[0] % n

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")


def value(given: Bytes) -> object:
    """Of a field of the header: of any type."""
    kind = given.below(8)
    if kind < 4:
        return [given.below(256), given.number(), -given.below(9), given.number() << 40][kind]
    return [None, "f16", 1.5, [given.below(9)]][kind - 4]


def changed(saved: bytes, given: Bytes) -> bytes:
    """The file with the changes that the input asks for."""
    length = struct.unpack_from("<I", saved, 12)[0]
    start, header, data = saved[:16], saved[16 : 16 + length], saved[16 + length :]
    fields = json.loads(header)
    repaired, raw_header = given.below(2) == 0, None
    for _ in range(given.below(5)):
        match given.below(7):
            case 0:
                fields[FIELDS[given.below(len(FIELDS))]] = value(given)
            case 1:
                fields.pop(FIELDS[given.below(len(FIELDS))], None)
            case 2:
                data = data[: max(0, len(data) - given.below(200))]
            case 3:
                data += given.take(given.below(200))
            case 4 if data:
                at = given.number() % len(data)
                data = (data[:at] + given.take(1 + given.below(4)) + data[at:])[: len(data)]
            case 5:
                raw_header = given.take(given.below(120))
            case 6:
                at = given.below(16)
                start = (start[:at] + given.take(given.below(5)) + start[at:])[:16]
    if repaired:
        fields["data"] = hashlib.sha256(data).hexdigest()
    header = json.dumps(fields).encode() if raw_header is None else raw_header
    if given.below(2) == 0:
        start = start[:12] + struct.pack("<I", len(header))
    file = start + header + data
    return file[: given.number() % (len(file) + 1)] if given.below(8) == 7 else file


class Fuzzer:
    """Inputs, one after the other, against one model."""

    TEXT = "the abc Paris " * 12

    def __init__(self) -> None:
        from toy_models import concatenating, write_model

        import fixmin_cpp

        self.error = fixmin_cpp.FixminError
        self.folder = tempfile.TemporaryDirectory(prefix="fixmin-fuzz-")
        self.path = Path(self.folder.name, "state")
        path = write_model(Path(self.folder.name, "toy.gguf"), concatenating(), context_length=160)
        self.model = fixmin_cpp.Model(path, n_threads=1, n_kv=160)
        assert self.model.save_state(self.path, self.TEXT) >= 64
        self.saved = self.path.read_bytes()
        self.ids = self.model.load_state(self.path)
        self.want = self.fresh_logits()

    def fresh_logits(self) -> np.ndarray:
        """[V] of the text, with nothing known of it."""
        self.model.clear_prefix_cache()
        return self.model.logits(self.ids, last=True)

    def __call__(self, data: bytes) -> None:
        file = changed(self.saved, Bytes(data))
        self.path.write_bytes(file)
        self.model.clear_prefix_cache()
        refused, ids = "", []
        try:
            ids = self.model.load_state(self.path)
        except self.error as error:
            refused = str(error)
        if refused:
            assert file != self.saved, refused
            assert str(self.path) in refused, refused  # which file
        else:
            assert 0 < len(ids) <= 160, ids
            assert all(0 <= i < 64 for i in ids), ids
        if file == self.saved:
            assert np.array_equal(self.model.logits(self.ids, last=True), self.want)
        elif data and data[-1] % 4 == 0:  # what it has taken is used: numbers of any kind
            with contextlib.suppress(self.error):
                self.model.logits(self.ids, last=True)
        assert np.array_equal(self.fresh_logits(), self.want)

    def close(self) -> None:
        self.model.close()
        self.folder.cleanup()


if __name__ == "__main__":
    from instrumented import fuzz

    fuzz(Fuzzer, "fixmin_cpp.model")
