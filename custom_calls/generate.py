"""Generates C++ sources: the FFI bindings, the list of kernels, and a source for each kernel.

usage: generate.py INTERFACE FOLDER KERNELS ... [--few]

INTERFACE is jax_latent_moe/native_interface.json. FOLDER/interface.h gets a struct for each target, with the arguments
of a call, and the declaration of the function that handles it. FOLDER/interface.cc binds these functions to XLA's FFI.
KERNELS are text files with the name of a kernel on each line (src/sm90/kernels.txt). FOLDER/ARCHITECTURE/kernels.inc
gets a line for each, and FOLDER/ARCHITECTURE/NAME.cu compiles it. --few takes only the kernels marked "few".
The script prints the paths of the kernels' sources, separated by semicolons.
"""

import argparse
import hashlib
import json
import pathlib
import re

TYPES = {"string": "std::string_view", "bool": "bool", "int32": "int32_t", "float32": "float"}
KERNEL = re.compile(
    r"(?P<architecture>sm\d+)\.(?P<contraction>fwd|dgrad|wgrad)\.(?P<format>\w+)"
    r"(\.(?P<activation>\w+):(?P<residual>\w+))?"
    r"\.(?P<rows>\d+)x(?P<columns>\d+)x(?P<stages>\d+)\.(?P<cluster_rows>\d+)x(?P<cluster_columns>\d+)"
)


def main():
    """Writes the files that change. The others keep their time, so that they are not compiled again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interface", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("kernels", type=pathlib.Path, nargs="+")
    parser.add_argument("--few", action="store_true")
    arguments = parser.parse_args()
    targets = json.loads(arguments.interface.read_text())
    files = {"interface.h": header(targets), "interface.cc": bindings(targets)}
    files |= kernel_files(kernel_names("\n".join(path.read_text() for path in arguments.kernels), few=arguments.few))
    for name, text in files.items():
        path = arguments.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    print(*(arguments.folder / name for name in files if name.endswith(".cu")), sep=";", end="")


def interface_hash(targets: dict) -> str:
    """The same hash as interface_hash in jax_latent_moe/native.py."""
    return hashlib.sha256(json.dumps(targets, separators=(",", ":")).encode()).hexdigest()[:16]


def header(targets: dict) -> str:
    """The structs of calls, and the declarations of the functions that handle them."""
    structs = "\n".join(_struct(name, target) for name, target in targets.items())
    return f"""// What the library and Python agree on. Generated from native_interface.json by generate.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace latent_moe {{

namespace ffi = xla::ffi;

constexpr char kInterfaceHash[] = "{interface_hash(targets)}";

{structs}
}}  // namespace latent_moe
"""


def bindings(targets: dict) -> str:
    """A handler for each target, exported under the name that XLA looks up."""
    calls, handlers = [], []
    for name, target in targets.items():
        parameters = ", ".join(f"{type_} {field}" for type_, field, _ in _fields(target))
        fields = ", ".join(field for _, field, _ in _fields(target))
        chain = ["Ctx<ffi::PlatformStream<cudaStream_t>>()"]
        chain += ["Arg<ffi::AnyBuffer>()"] * len(target["operands"])
        chain += ["Ret<ffi::AnyBuffer>()"] * len(target["results"])
        chain += [f'Attr<{TYPES[type_]}>("{field}")' for field, type_ in target["attributes"].items()]
        calls.append(f"ffi::Error call_{name}({parameters}) {{ return {name}({{{fields}}}); }}")
        calls.append(f"auto bind_{name}() {{ return ffi::Ffi::Bind().{'.'.join(chain)}; }}")
        handlers.append(f"LATENT_MOE_HANDLER(latent_moe_{name}, latent_moe::call_{name}, latent_moe::bind_{name}())")
    return "\n".join(
        [
            "// Generated from native_interface.json by generate.py.",
            '#include "interface.h"\n',
            '#include "ffi/handler.h"\n',
            "namespace latent_moe {\nnamespace {\n",
            *calls,
            "\n}  // namespace\n}  // namespace latent_moe\n",
            *handlers,
            "LATENT_MOE_EXPORT char const* latent_moe_interface_hash() { return latent_moe::kInterfaceHash; }\n",
        ]
    )


def kernel_names(text: str, *, few: bool) -> list[str]:
    """The kernels' names in a list; with `few`, only those that are marked."""
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    names = [name for name, *marks in lines if not few or marks == ["few"]]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"error: {', '.join(sorted(doubles))} must be listed only once.")
    return names


def kernel_files(names: list[str]) -> dict[str, str]:
    """By path: the list of each architecture's kernels, and a source for each kernel."""
    lists, sources = {}, {}
    for name in names:
        kernel = KERNEL.fullmatch(name)
        if kernel is None:
            raise SystemExit(f"error: {name!r} is not a kernel's name: it must match {KERNEL.pattern}.")
        architecture = kernel["architecture"]
        words = [kernel["contraction"], kernel["format"], kernel["activation"] or "none", kernel["residual"] or "none"]
        sizes = [kernel[size] for size in ("rows", "columns", "stages", "cluster_rows", "cluster_columns")]
        fields = ", ".join([*map(_enumerator, words), *sizes])
        lists.setdefault(architecture, []).append(f'LATENT_MOE_KERNEL("{name}", {fields})')
        source = "widened_kernel.cuh" if kernel["format"] == "bf16_codes" else "grouped_kernel.cuh"
        sources[f"{architecture}/{name.replace(':', '-')}.cu"] = (
            f'#include "{architecture}/{source}"\n\nLATENT_MOE_COMPILE({fields})\n'
        )
    return {f"{name}/kernels.inc": "\n".join(lines) + "\n" for name, lines in lists.items()} | sources


def _struct(name: str, target: dict) -> str:
    fields = "\n".join(
        f"  {type_} {field};" + (f"  // {described}" if described else "")
        for type_, field, described in _fields(target)
    )
    call = "".join(word.capitalize() for word in name.split("_"))
    return f"struct {call}Call {{\n{fields}\n}};\n\nffi::Error {name}({call}Call const& call);\n"


def _fields(target: dict) -> list[tuple[str, str, str]]:
    """(C++ type, name, description) of each argument of a call, in order."""
    return [
        ("cudaStream_t", "stream", ""),
        *(("ffi::AnyBuffer", name, described) for name, described in target["operands"].items()),
        *(("ffi::Result<ffi::AnyBuffer>", name, described) for name, described in target["results"].items()),
        *((TYPES[type_], name, "") for name, type_ in target["attributes"].items()),
    ]


def _enumerator(word: str) -> str:
    return "k" + "".join(part.capitalize() for part in word.split("_"))


if __name__ == "__main__":
    main()
