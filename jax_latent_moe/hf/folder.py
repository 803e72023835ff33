"""A folder of safetensors files, with or without an index, as one set of named tensors."""

import json
import os
import pathlib
from collections.abc import Iterable

from jax_latent_moe.errors import CheckpointError
from jax_latent_moe.hf.tensor_file import TensorInfo, read_header, read_json

INDEX = "model.safetensors.index.json"


class TensorFolder:
    """The names of all tensors, and the file of each.

    A file's header is read when one of its tensors is first located. With an index, therefore, one layer can be read
    while the files of other layers are absent.

    Attributes:
        path: the folder.
        file_of: the name of the file that holds each tensor, by the tensor's name.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the index, or the headers of all *.safetensors files if there is no index.

        Raises:
            CheckpointError: there is no such folder, it holds neither, or they are not valid.
        """
        if not path.is_dir():
            problem = "it is a file, not a folder." if path.exists() else "there is no such folder."
            raise CheckpointError(path, [problem])
        self.path = path
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        index = path / INDEX
        self._indexed = os.path.lexists(index)  # a link that leads nowhere is an error, not an absent index
        self.file_of = _read_index(index) if self._indexed else self._read_files()
        self._names_in: dict[str, set[str]] = {}
        for name, file in self.file_of.items():
            self._names_in.setdefault(file, set()).add(name)

    def _read_files(self) -> dict[str, str]:
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(self.path, [f"it holds neither {INDEX} nor any *.safetensors file."])
        file_of, problems = {}, []
        for file in files:
            for name in self._header(file):
                if name in file_of:
                    problems.append(f"{name} is in {file_of[name]} and in {file}.")
                file_of[name] = file
        if problems:
            raise CheckpointError(self.path, problems)
        return file_of

    def _header(self, file: str) -> dict[str, TensorInfo]:
        if file not in self._headers:
            header = read_header(self.path / file)
            if self._indexed:
                _check_index(self.path / file, header, self._names_in[file])
            self._headers[file] = header
        return self._headers[file]

    def locate(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """The file, dtype, shape and offset of each of these tensors.

        Raises:
            CheckpointError: no tensor has such a name; or a file is absent, invalid or does not match the index.
        """
        names = list(names)
        unknown = [name for name in names if name not in self.file_of]
        if unknown:
            raise CheckpointError(self.path, [f"no tensor is called {name}." for name in unknown])
        return {name: self._header(self.file_of[name])[name] for name in names}


def write_index(path: pathlib.Path, file_of: dict[str, str], total_size: int) -> None:
    """Writes the index of a folder."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(file_of.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _read_index(path: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(path, ["weight_map is missing or not an object."])
    problems = []
    for name, file in weight_map.items():
        # A name with a folder in it could reach files outside of the checkpoint. NUL and lone surrogates cannot be in
        # a file's name.
        plain = isinstance(file, str) and pathlib.PurePath(file).name == file and file.isprintable()
        if not plain or not file.endswith(".safetensors"):
            problems.append(f"weight_map[{name!r}] is {file!r}, which is not the name of a *.safetensors file.")
    if problems:
        raise CheckpointError(path, problems)
    return weight_map


def _check_index(path, header, expected):
    problems = [
        f"the file does not hold {name}, which the index places in it." for name in sorted(expected - set(header))
    ]
    problems += [
        f"the file holds {name}, which the index does not list for it." for name in sorted(set(header) - expected)
    ]
    if problems:
        raise CheckpointError(path, problems)
