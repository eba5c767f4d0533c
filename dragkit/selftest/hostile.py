"""Files that attack their reader: pickles that run a program, safetensors with false headers."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dragkit.generator.bundled import tiny_generator_path

_NPY_HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
# What a file of torch's first format begins with: magic number, version, an empty dictionary.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00."
_CODE = """\
import os
from transformers import PretrainedConfig, PreTrainedModel
os.mkdir({sentinel!r})
class Config(PretrainedConfig):
    model_type = "planted"
class Model(PreTrainedModel):
    config_class = Config
"""


def payload(sentinel: Path) -> bytes:
    """A pickle that makes the folder `sentinel` when it is loaded, without any library."""
    return b"cos\nmkdir\n(V" + str(sentinel).encode("ascii") + b"\ntR."


def _zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _tarred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("pickle")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _npy(data: bytes) -> bytes:
    header = _NPY_HEADER + b" " * (117 - len(_NPY_HEADER)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def payload_files(folder: Path, sentinel: Path) -> list[Path]:
    """Writes files that make `sentinel` in a reader that trusts them."""
    data = payload(sentinel)
    contents = {
        "bare.pkl": data,
        "archive.pt": _zipped(data),
        "legacy.pt": _LEGACY_START + data,
        "adapter_model.bin": data,
        "objects.npy": _npy(data),
        "weights.safetensors": data,
        "nested.tar": _tarred(data),
        "questions.jsonl": data,
        "settings.yaml": f"!!python/object/apply:os.mkdir [{str(sentinel)!r}]\n".encode(),
        "experiment.yaml": f"run: !!python/object/new:os.mkdir [{str(sentinel)!r}]\n".encode(),
    }
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def payload_models(folder: Path, sentinel: Path) -> list[Path]:
    """Writes model folders that make `sentinel` in a reader that trusts their files."""
    pickled = folder / "with-pickle"
    shutil.copytree(tiny_generator_path(), pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(_zipped(payload(sentinel)))
    renamed = folder / "with-renamed-pickle"
    shutil.copytree(tiny_generator_path(), renamed)
    (renamed / "model.safetensors").write_bytes(payload(sentinel))
    coded = folder / "with-code"
    coded.mkdir()
    (coded / "planted.py").write_text(_CODE.format(sentinel=str(sentinel)))
    names = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    config = {"model_type": "planted", "auto_map": names, "hidden_size": 8}
    (coded / "config.json").write_text(json.dumps(config))
    return [pickled, renamed, coded]


def _tensor_file(header: object, body: bytes = b"\x00" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


_TWICE = b'{"a":%s,"a":%s}' % tuple(
    json.dumps(entry).encode() for entry in (_entry([2], 0, 8), _entry([2], 8, 16))
)
FALSE_TENSORS: dict[str, Callable[[], bytes]] = {
    "a header of 2^63 bytes": lambda: _tensor_file({}, length=2**63),
    "a header past the end": lambda: _tensor_file({}, length=1000),
    "overlapping tensors": lambda: _tensor_file({"a": _entry([3], 0, 12), "b": _entry([3], 4, 16)}),
    "a hole": lambda: _tensor_file({"a": _entry([1], 0, 4), "b": _entry([1], 12, 16)}),
    "bytes left over": lambda: _tensor_file({"a": _entry([1], 0, 4)}),
    "a negative offset": lambda: _tensor_file({"a": _entry([4], -16, 0)}),
    "an end before the start": lambda: _tensor_file({"a": _entry([4], 16, 0)}),
    "another type's size": lambda: _tensor_file({"a": _entry([4], 0, 16, "F64")}),
    "an unknown type": lambda: _tensor_file({"a": _entry([4], 0, 16, "X9")}),
    "a shape that overflows": lambda: _tensor_file({"a": _entry([2**62, 4, 4], 0, 16)}),
    "a negative shape": lambda: _tensor_file({"a": _entry([-4], 0, 16)}),
    "a header that is no JSON": lambda: _tensor_file(b"\xff{" + b"[" * 1000),
    "a deep header": lambda: _tensor_file(b"[" * 100_000),
    "a tensor twice": lambda: _tensor_file(_TWICE),
    "no bytes": lambda: b"",
}
