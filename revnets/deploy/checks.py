"""What in a deployed file could run code or reach other files, found before its engine sees the file.

``torch.export.load`` unpickles tensors that ask for it, evaluates the texts of sizes, imports the modules that tree
structures name, calls any function of torch that a node names, and writes names of inputs into the source of a function
that it executes. So a ``.pt2`` is taken apart, all in it that is not known to be plain is refused, and the engine
gets an archive written anew from what is left.

ONNX Runtime and OpenVINO tell formats by their first bytes, whatever the file is called. So they get only bytes that
cannot be taken for another format than the one that was looked into.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..training.errors import shown
from .seal import Content, Untrusted, refusal

_LONGEST = 4096  # of a text
_DEEPEST = 60  # of lists and objects in each other


class _Refused(ValueError):
    """What is wrong, in words that follow "it holds"."""


def plain_program(content: Content) -> io.BytesIO:
    """A ``.pt2`` that can be given to ``torch.export.load``: written anew from what is plain data.

    Raises:
        Untrusted: for one that holds anything else, or is none.
    """
    if content.trusted:
        return io.BytesIO(content.data)
    try:
        return _write(_checked(_records(content.data)))
    except _Refused as error:
        raise Untrusted(refusal(content.path, f"it holds {error}")) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SyntaxError, MemoryError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise Untrusted(refusal(content.path, f"it is no program that deploy writes ({reason})")) from error


# --- the archive -----------------------------------------------------------------------------------------------------

_VERSIONS = ("archive_format", "archive_version", "byteorder", "version", ".data/version", ".data/serialization_id")
_PROGRAM = "models/model.json"
_CONFIG = re.compile(r"data/(weights|constants)/model_(weights|constants)_config\.json")
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}")
_SAVED = re.compile(r"data/(weights|constants|sample_inputs)/model\.pt")  # by torch.save


def _records(data: bytes) -> dict[str, bytes]:
    """The parts of an archive by name, as torch's own reader finds them."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    names = reader.get_all_records()
    if len(set(names)) != len(names):
        raise _Refused("two parts of one name")
    sizes = [reader.get_record_size(name) for name in names] if hasattr(reader, "get_record_size") else []
    if sum(sizes) > len(data):
        raise _Refused("compressed parts")
    return {name: reader.get_record(name) for name in names}


def _checked(records: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same parts, the program without what is only a help to those who debug it."""
    found = {}
    for name, data in records.items():
        if name == _PROGRAM:
            found[name] = json.dumps(_program(json.loads(data))).encode()
        elif _CONFIG.fullmatch(name):
            found[name] = json.dumps(_payloads(json.loads(data), name)).encode()
        elif _SAVED.fullmatch(name):
            _check_saved(data, name)
            found[name] = data
        elif name in _VERSIONS or _TENSOR.fullmatch(name):
            found[name] = data
        else:
            raise _Refused(f"{shown(name)}, which is no part of an exported program")
    if _PROGRAM not in found:
        raise _Refused("no program")
    return found


def _write(records: Mapping[str, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    own = (".data/version", ".data/serialization_id", "version", "byteorder")  # it writes these itself
    for name, data in records.items():
        if name not in own:
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    file.seek(0)
    return file


def _check_saved(data: bytes, name: str) -> None:
    """That a part of ``torch.save`` is of tensors and plain values: torch would read any other one unsafely."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Refused(f"more than tensors in {name}") from error


def _payloads(config: Any, name: str) -> Any:
    """Which part holds which tensor, once it is known that none is pickled."""
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise _Refused(f"no list of tensors in {name}")
    kind = "weight" if "/weights/" in name else "tensor"
    for entry in config["config"].values():
        if entry.get("use_pickle") not in (None, False):
            raise _Refused("a pickled tensor")
        if not re.fullmatch(kind + r"_\d{1,9}", str(entry.get("path_name"))):
            raise _Refused(f"{shown(entry.get('path_name'))} among its tensors")
    _check(config, "", 0)
    return config


# --- the program -----------------------------------------------------------------------------------------------------

_HELP = ("metadata", "guards_code")  # stack traces and names of modules; checks of sizes, which are executed
_WORD = re.compile(r"[A-Za-z_]\w{0,511}", re.ASCII)
_DOTTED = re.compile(r"[\w.]{0,1023}", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|revnets)\.\w+(\.\w+)?"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(max|min|not|float|int|ite|sum)"
    r"|math\.(trunc|ceil|floor)",
    re.ASCII,
)
_FORBIDDEN = re.compile(r"\.(from_file|set_|set_data|_print|resize_|resize_as_)\b|storage|nested|sparse_.*unsafe")
_CUSTOM = ("as_custom_obj", "as_operator", "as_graph", "custom_obj", "token", "as_nested_tensors")


def _program(program: Any) -> Any:
    if not isinstance(program, dict):
        raise _Refused("no program")
    plain = _without_help(program, 0)
    if "guards_code" in program:
        plain["guards_code"] = []
    _check(plain, "", 0)
    return plain


def _without_help(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise _Refused("parts in parts without end")
    if isinstance(value, dict):
        return {k: {} if k == "metadata" else _without_help(v, depth + 1) for k, v in value.items() if k != _HELP[1]}
    return [_without_help(v, depth + 1) for v in value] if isinstance(value, list) else value


def _check(value: Any, key: str, depth: int) -> None:
    """That a value is plain: every text under a name whose texts are known, every name a word."""
    if depth > _DEEPEST:
        raise _Refused("parts in parts without end")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not _DOTTED.fullmatch(name.removeprefix("$")):
                raise _Refused(f"the name {shown(name)}")
            if name in _CUSTOM and inner is not None:
                raise _Refused(f"an object of another kind than a tensor ({name})")
            _check(inner, name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, key, depth + 1)
    elif isinstance(value, str) and not (len(value) <= _LONGEST and _TEXTS.get(key, _no_text)(value)):
        raise _Refused(f"{shown(value)} as {key or 'a text'}")


def _no_text(text: str) -> bool:
    return False


def _is_word(text: str) -> bool:
    """A name that can be written into source."""
    return not text or (_WORD.fullmatch(text) is not None and not keyword.iskeyword(text))


def _is_dotted(text: str) -> bool:
    return _DOTTED.fullmatch(text) is not None and not any(part.startswith("__") for part in text.split("."))


def _is_operator(text: str) -> bool:
    return _OPERATOR.fullmatch(text) is not None and _FORBIDDEN.search(text) is None


def _is_tree(text: str) -> bool:
    """Tuples, lists and dictionaries with words for keys: of others, torch imports what they name."""
    tree = json.loads(text)
    return not text or (isinstance(tree, list) and len(tree) == 2 and isinstance(tree[0], int) and _is_node(tree[1], 0))


def _is_node(node: Any, depth: int) -> bool:
    if depth > _DEEPEST or not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        return False
    kind, context, children = node["type"], node["context"], node["children_spec"]
    keys = json.loads(context) if isinstance(context, str) else context
    if kind == "builtins.dict":
        plain = isinstance(keys, list) and all(isinstance(k, str) and _is_word(k) for k in keys)
    else:
        plain = kind in (None, "builtins.tuple", "builtins.list") and keys is None
    return plain and isinstance(children, list) and all(_is_node(child, depth + 1) for child in children)


_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """Symbol Integer Add Mul Pow Mod Max Min Abs floor ceiling Eq Ne Lt Le Gt Ge And Or Not Equality Unequality
        StrictLessThan LessThan StrictGreaterThan GreaterThan FloorDiv ModularIndexing Where PythonMod CleanDiv
        CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat
        TruncToInt RoundToInt RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator""",
    )
)
_SYMBOL = re.compile(r"z?[suf]\d{1,6}|oo|int_oo|true|false|True|False", re.ASCII)
_ALGEBRA = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Load, ast.operator, ast.unaryop)
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")


def _is_size(text: str) -> bool:
    """An expression of sizes, which sympy evaluates as Python: numbers, symbols, and functions that are known."""
    if len(text) > 1024:
        return False
    nodes = list(ast.walk(ast.parse(text, mode="eval")))
    powers = [n for n in nodes if isinstance(n, ast.Pow) or (isinstance(n, ast.Name) and n.id in _POWERS)]
    return len(powers) <= 3 and all(_is_algebra(node) for node in nodes)  # powers of powers need no end of memory


def _is_small(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and abs(node.value) <= 64


def _is_algebra(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
            return False
        if node.func.id in _POWERS:
            return all(not isinstance(a, ast.Constant) or _is_small(a) for a in node.args[1:])
        return True
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.keyword):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (bool, int, float)) or _SYMBOL.fullmatch(str(node.value)) is not None
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
        return _is_small(node.right)
    return isinstance(node, (*_ALGEBRA, ast.cmpop, ast.boolop))


_TEXTS: Mapping[str, Callable[[str], bool]] = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _is_word),
    **dict.fromkeys(
        ("fqn", "parameter_name", "buffer_name", "tensor_constant_name", "buffer_to_mutate", "parameter_to_mutate"),
        _is_dotted,
    ),
    **dict.fromkeys(("user_input_name", "user_input_to_mutate", "field_names"), _is_word),
    **dict.fromkeys(("path_name",), _is_word),
    **dict.fromkeys(("in_spec", "out_spec"), _is_tree),
    "target": _is_operator,
    "expr_str": _is_size,
    "as_string": lambda text: len(text) <= 64,
    "as_strings": lambda text: len(text) <= 64,
    "type": lambda text: re.fullmatch(r"[a-z]{1,20}", text) is not None,
    "torch_version": lambda text: re.fullmatch(r"[\w.+-]{0,64}", text, re.ASCII) is not None,
    "dialect": _is_word,
    "verifiers": _is_word,
    "$float": lambda text: text in ("Infinity", "-Infinity", "NaN"),
}
"""By the name that a text comes under: what it may be."""


# --- OpenVINO --------------------------------------------------------------------------------------------------------

_XML = b"<?xml "  # no white space before it: a model of ONNX may begin with that


def plain_xml(content: Content) -> bytes:
    """The bytes of an ``.xml`` that OpenVINO takes for nothing else: models of ONNX may name other files.

    Raises:
        Untrusted: for one that does not begin as XML.
    """
    if not content.trusted and not content.data.startswith(_XML):
        raise Untrusted(refusal(content.path, f"it is no XML (it does not begin with {_XML.decode().strip()!r})"))
    return content.data


# --- ONNX ------------------------------------------------------------------------------------------------------------


def plain_onnx(content: Content) -> bytes:
    """A model of ONNX whose tensors are all inside of it: written anew, without fields that the check does not know.

    Raises:
        Untrusted: for one that names other files, or is none.
    """
    if content.trusted:
        return content.data
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content.data)
        problem = _reaches_out(model, 0)
        model.DiscardUnknownFields()  # those of other formats, and of later releases than that of the check
        plain: bytes = model.SerializeToString()
    except (DecodeError, RecursionError) as error:
        raise Untrusted(refusal(content.path, "it is no ONNX model")) from error
    if problem:
        raise Untrusted(refusal(content.path, f"it holds {problem}"))
    return plain


def _reaches_out(message: Any, depth: int) -> str:
    """What in a message names another file, in words; empty where nothing does."""
    if depth > 2 * _DEEPEST:
        return "parts in parts without end"
    for field, value in message.ListFields():
        if field.name in ("external_data", "data_location") and value:
            return "weights that lie in other files"
        if field.name == "op_type" and value == "EPContext":
            return "a part that was compiled elsewhere"
        if field.message_type is None:
            continue
        repeated = hasattr(value, "append") or hasattr(value, "add")
        for inner in value if repeated else (value,):
            if problem := _reaches_out(inner, depth + 1):
                return problem
    return ""
