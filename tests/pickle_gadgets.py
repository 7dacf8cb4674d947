"""Pickles that run code when Python loads them, put together opcode by opcode, and files that carry them.

Every gadget makes a file, the canary. Knows the formats' containers; which reader refuses what is in the tests.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from regraft.readers.torch_pickle import LEGACY


@dataclass(frozen=True)
class Name:
    """An import: `module.name`."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What calling `function` (a Name or what another Call gives) with these arguments gives."""

    function: object
    arguments: tuple


def pickled(value):
    """A pickle of protocol 2 of the value, calls and all."""
    return b"\x80\x02" + _body(value) + b"."


def _body(value):
    match value:
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return _body(function) + _body(arguments) + b"R"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(_body, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_body, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_body(k) + _body(v) for k, v in value.items()) + b"u"
    raise TypeError(value)


def gadgets(canary, script):
    """Gadgets by name. canary: the path that each makes a file of; script: a file of Python that makes it too."""
    touch, run = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    script.write_text(run)
    inner = script.with_suffix(".npy")
    inner.write_bytes(npy(pickled(Call(Name("os", "system"), (touch,)))))
    saved = script.with_suffix(".pt")
    saved.write_bytes(torch_zip(pickled(Call(Name("os", "system"), (touch,)))))
    get = Name("builtins", "getattr")
    module = Call(Name("importlib", "import_module"), ("os",))
    code = Call(Name("builtins", "compile"), (run, "x", "exec"))
    opened = (str(canary), "w")
    loaded = pickled(Call(Name("os", "system"), (touch,))).decode("latin1")
    return {
        "os.system": Call(Name("os", "system"), (touch,)),
        "posix.system": Call(Name("posix", "system"), (touch,)),
        "os.popen": Call(Call(get, (Call(Name("os", "popen"), (touch,)), "read")), ()),
        "subprocess.call": Call(Name("subprocess", "call"), (["touch", str(canary)],)),
        "subprocess.check_output": Call(Name("subprocess", "check_output"), (["touch", str(canary)],)),
        "eval": Call(Name("builtins", "eval"), (f"__import__('os').system({touch!r})",)),
        "exec": Call(Name("builtins", "exec"), (run,)),
        "Python 2 eval": Call(Name("__builtin__", "eval"), (f"__import__('os').system({touch!r})",)),
        "importlib and getattr": Call(Call(get, (module, "system")), (touch,)),
        "operator.attrgetter": Call(Call(Call(Name("operator", "attrgetter"), ("system",)), (module,)), (touch,)),
        "operator.methodcaller": Call(Call(Name("operator", "methodcaller"), ("system", touch)), (module,)),
        "functools.partial": Call(Call(Name("functools", "partial"), (Name("os", "system"), touch)), ()),
        "runpy.run_path": Call(Name("runpy", "run_path"), (str(script),)),
        "types.FunctionType": Call(Call(Name("types", "FunctionType"), (code, {})), ()),
        "code.InteractiveInterpreter": Call(
            Call(get, (Call(Name("code", "InteractiveInterpreter"), ()), "runcode")), (code,)
        ),
        "timeit.timeit": Call(Name("timeit", "timeit"), (run, "pass", Name("time", "time"), 1)),
        "open": Call(Name("builtins", "open"), opened),
        "io.open": Call(Name("io", "open"), opened),
        "pathlib.Path.touch": Call(Call(get, (Call(Name("pathlib", "Path"), (str(canary),)), "touch")), ()),
        "shutil.copyfile": Call(Name("shutil", "copyfile"), (str(script), str(canary))),
        "numpy.load": Call(Name("numpy", "load"), (str(inner), None, True)),
        "torch.load": Call(
            Name("torch", "load"), (str(saved), "cpu", Call(Name("importlib", "import_module"), ("pickle",)))
        ),
        "pickle.loads": Call(Name("pickle", "loads"), (Call(Name("_codecs", "encode"), (loaded, "latin1")),)),
        "webbrowser.open": Call(
            Call(get, (Call(Name("webbrowser", "GenericBrowser"), (["touch", "%s"],)), "open")), (str(canary),)
        ),
    }


def torch_zip(pickle_bytes, root="archive", **more):
    """An archive as torch.save writes it around this pickle; more: entries by name, beside it."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        entries = {"data.pkl": pickle_bytes, "byteorder": b"little", "version": b"3\n", **more}
        for name, data in entries.items():
            archive.writestr(f"{root}/{name}", data)
    return whole.getvalue()


def torch_legacy(pickle_bytes):
    """A file as torch wrote it before version 1.6, around this pickle."""
    return (
        LEGACY + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + pickle_bytes + pickle.dumps([], 2)
    )


def npy(pickle_bytes):
    """A `.npy` file of one object, which this pickle gives."""
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + pickle_bytes


def npz(pickle_bytes):
    """A `.npz` file with such an array in it."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("weights.npy", npy(pickle_bytes))
    return whole.getvalue()


def exported_with(source: bytes, entries: dict[str, bytes]):
    """An exported program with some entries (named without the first folder) put in place of its own."""
    whole = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(whole, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, entries.get(name.removeprefix(f"{root}/"), old.read(name)))
    return whole.getvalue()


def with_pickled_weight(source: bytes, pickle_bytes: bytes):
    """An exported program whose first weight is said to be pickled, and is this."""
    with zipfile.ZipFile(io.BytesIO(source)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("_weights_config.json"))
        listed = json.loads(archive.read(name))
    first = next(iter(listed["config"].values()))
    first["use_pickle"] = True
    config = name.partition("/")[2]
    return exported_with(
        source,
        {
            config: json.dumps(listed).encode(),
            f"data/weights/{first['path_name']}": torch_zip(pickle_bytes),
            "data/sample_inputs/model.pt": torch_zip(pickle_bytes),
        },
    )


def refuses(read, path: Path, error):
    """The one sentence with which `read` refuses the file, without a line break and with the file's name."""
    try:
        found = read(path)
    except error as e:
        said = str(e)
        assert "\n" not in said, said
        assert path.name in said, said
        return said
    raise AssertionError(f"{path} was read: {found}")
