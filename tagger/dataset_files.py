"""Dataset files: found by name or path, read from YAML, every mistake told with file, key, found and expected."""

import os
import re
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tagger.dataset import (
    LLM,
    Alerts,
    AssetSchedule,
    Dataset,
    Example,
    Limits,
    Lock,
    Price,
    Retention,
    Shards,
    Source,
    Tag,
    Target,
    Task,
    Tasks,
)
from tagger.example_files import FORM, ExampleFile, WrongExamples, read_examples
from tagger.exceptions import DatasetError, InputError, Mistake


def datasets_folder() -> Path:
    """Return `$TAGGER_DATASETS`, or else `dags/datasets` below the working directory."""
    return Path(os.environ.get("TAGGER_DATASETS") or Path("dags", "datasets"))


def dataset_files(folder: Path) -> list[Path]:
    """Return the dataset files of a folder, in name order."""
    return sorted(p for p in folder.glob("*.y*ml") if p.suffix in {".yaml", ".yml"} and p.is_file())


def dataset_paths(names: list[str]) -> list[Path]:
    """Return the files of datasets given by name or path; without any, all of the folder.

    Raises:
        InputError: there is no such file, or none at all.
    """
    paths = [find_dataset(name) for name in names] if names else dataset_files(datasets_folder())
    if not paths:
        raise InputError(f"no dataset files in {datasets_folder()}; $TAGGER_DATASETS names another folder")
    return paths


def find_dataset(name_or_path: str, folder: Path | None = None) -> Path:
    """Return the file of a dataset given by its name or by a path.

    Raises:
        InputError: there is no such file.
    """
    if name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"no dataset file {name_or_path}")
        return path
    folder = folder or datasets_folder()
    files = dataset_files(folder)
    for path in files:
        if name_or_path in (path.stem, _name_in(path)):
            return path
    known = ", ".join(path.stem for path in files) or "none"
    raise InputError(f"no dataset `{name_or_path}` in {folder} (there: {known}); $TAGGER_DATASETS names another folder")


def _name_in(path: Path) -> str | None:
    try:
        content = read_yaml(path)
    except DatasetError:
        return None
    name = content.get("dataset") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def load_dataset(path: Path) -> Dataset:
    """Read and validate a dataset file, and check it against the other files of its folder.

    Raises:
        DatasetError: the file, the key, what was found and what is expected, for each mistake.
    """
    others = [other for other in dataset_files(path.parent) if other.resolve() != path.resolve()]
    loaded = load_datasets([path, *others])[path]
    if isinstance(loaded, DatasetError):
        raise loaded
    return loaded


def load_datasets(paths: list[Path]) -> dict[Path, Dataset | DatasetError]:
    """Read dataset files, each once, and check them against one another; return each one's dataset or its mistakes."""
    loaded = {path: _load(path) for path in paths}
    datasets = {path: dataset for path, dataset in loaded.items() if isinstance(dataset, Dataset)}
    for path, dataset in datasets.items():
        if mistakes := _taken_by_others(path, dataset, datasets):
            loaded[path] = DatasetError(str(path), mistakes)
    return loaded


def _load(path: Path) -> Dataset | DatasetError:
    try:
        content = read_yaml(path)
        if isinstance(content, dict) and isinstance(content.get("examples"), str):
            return _with_example_file(content, path)
        return parse_dataset(content, str(path))
    except DatasetError as e:
        return e


def _with_example_file(content: dict[Any, Any], path: Path) -> Dataset:
    """Return the dataset with the examples of the file that it names; every other mistake of its own is told too."""
    try:
        found = read_examples(content["examples"], path.parent)
    except WrongExamples as e:
        mistakes = [e.args[0]]
        try:
            parse_dataset({**content, "examples": []}, str(path))
        except DatasetError as others:
            mistakes += others.mistakes
        raise DatasetError(str(path), mistakes) from None
    try:
        return parse_dataset({**content, "examples": found.examples}, str(path))
    except DatasetError as e:
        raise DatasetError(str(path), [_in_example_file(mistake, found) for mistake in e.mistakes]) from None


def _in_example_file(mistake: Mistake, file: ExampleFile) -> Mistake:
    in_list = re.fullmatch(r"examples\[(\d+)\](?:\.(\w+))?.*", mistake.key)
    if in_list is None:
        return mistake
    return Mistake(file.where(int(in_list[1]), in_list[2] or ""), mistake.found, mistake.expected)


def _taken_by_others(path: Path, dataset: Dataset, datasets: dict[Path, Dataset]) -> list[Mistake]:
    mistakes = []
    for other, taken in datasets.items():
        if other == path:
            continue
        if taken.dataset == dataset.dataset:
            mistakes.append(Mistake("dataset", repr(dataset.dataset), f"a name that {other.name} does not have"))
        if (taken.target_conn_id, taken.target.table) == (dataset.target_conn_id, dataset.target.table):
            mistakes.append(
                Mistake("target.table", repr(dataset.target.table), f"a table that is not the target of {other.name}")
            )
    return mistakes


MAX_CHARS = 1_000_000
"""Of a dataset file, also with its aliases written out: a thousand tags have some 200,000."""

TOO_LARGE = Mistake("file", f"more than {MAX_CHARS:,} characters", "a smaller one; many examples go into a CSV")


class _Loader(yaml.SafeLoader):
    """YAML without silently overwritten keys, whose every error tells the line."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _written_out(node, {}) > MAX_CHARS:
            raise yaml.constructor.ConstructorError(None, None, "aliases that make the file too large", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as e:
            raise yaml.constructor.ConstructorError(None, None, f"no valid value ({e})", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list, set)):
                raise yaml.constructor.ConstructorError(None, None, "a key that is not a word", key_node.start_mark)
            if key in seen:
                named = f" `{key}`" if re.fullmatch(r"[\w.-]+", str(key), re.ASCII) else ""  # others may be a text
                raise yaml.constructor.ConstructorError(None, None, f"key{named} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Return about how many characters a node has where each alias is what it stands for.

    An alias of what it stands in counts nothing: that is a mistake in whatever key it is.
    """
    if id(node) not in known:
        known[id(node)] = 0
        if isinstance(node, yaml.ScalarNode):
            size = len(node.value)
        else:
            parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            size = sum(_written_out(part, known) for part in parts)
        known[id(node)] = size + 1
    return known[id(node)]


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        DatasetError: it cannot be read, is not YAML, or too large.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARS + 1)
        if len(text) > MAX_CHARS:
            raise DatasetError(str(path), [TOO_LARGE])
        return yaml.load(text, _Loader)
    except OSError as e:
        raise DatasetError(str(path), [Mistake("file", e.strerror or type(e).__name__, "a readable file")]) from None
    except UnicodeDecodeError as e:
        raise DatasetError(str(path), [Mistake("file", f"byte {e.start} is not UTF-8", "UTF-8")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        found = getattr(e, "problem", None) or "no valid YAML"
        raise DatasetError(str(path), [Mistake(where, str(found), "valid YAML")]) from None


def parse_dataset(content: Any, file: str) -> Dataset:
    """Validate the content of a dataset file; `file` names it in errors.

    Raises:
        DatasetError: one mistake for each thing to mend.
    """
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise DatasetError(file, [Mistake("file", found, "the keys of a dataset, such as `dataset:` and `source:`")])
    try:
        return Dataset.model_validate(content)
    except ValidationError as e:
        errors = e.errors(include_url=False)
    schedule = content.get("schedule")
    other_branch = "constrained-str" if isinstance(schedule, dict) else "AssetSchedule"
    told = [error for error in errors if error["loc"][:2] != ("schedule", other_branch)]
    raise DatasetError(file, [_mistake(error) for error in told])


_UNION_BRANCHES = ("constrained-str", "AssetSchedule")
_TYPE_NAMES = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "keys"}


def _mistake(error: Any) -> Mistake:
    location = [part for part in error["loc"] if part not in _UNION_BRANCHES]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return Mistake(key, "nothing", "a value (the key is required)")
    if kind == "string_unicode":
        return Mistake(key, "text", "text without halves of surrogate pairs")
    if location[:1] == ["examples"]:
        return _mistake_in_examples(key, location, error)
    if kind == "extra_forbidden":
        return Mistake(key, "an unknown key", _known_keys(location))
    if kind == "value_error":
        message = str(context["error"])
        if not key:  # from a validator of the whole file, which names the key itself
            key, message = message.split(": ", 1)
            value = _at(value, key)
        return Mistake(key, _show(value), message)
    if kind in ("model_type", "dict_type"):
        return Mistake(key, _show(value), "keys: " + _known_keys([*location, ""]).removeprefix("one of "))
    if kind == "string_type":
        forms = ", null, or {assets: [uri]}" if key == "schedule" else ""
        return Mistake(key, _show(value), f"text (in quotes, if it reads like another type){forms}")
    message = str(error["msg"]).removeprefix("Input should be ")
    return Mistake(key, _show(value), message[0].lower() + message[1:])


def _mistake_in_examples(key: str, location: list[str | int], error: Any) -> Mistake:
    """Return a mistake in the examples, without anything that may be a text: also a key may be one."""
    kind = error["type"]
    if kind == "extra_forbidden":
        where = "".join(f"[{part}]" for part in location[1:2])
        return Mistake(f"examples{where}", "an unknown key", _known_keys(location))
    expected = "a list of tag ids" if location[-1] == "tags" else _EXAMPLE_FORMS.get(len(location), "text")
    if kind == "value_error":
        expected = str(error["ctx"]["error"])
    return Mistake(key, _kind(error["input"]), expected)


_EXAMPLE_FORMS = {1: FORM, 2: "keys: tags, text"}
"""What is expected of the list and of an entry."""


def _at(content: Any, key: str) -> Any:
    """Return what stands at a key such as `target.table` or `examples[2].tags`; None where nothing does."""
    for part in re.findall(r"[^.\[\]]+", key):
        content = content[int(part)] if isinstance(content, list) else (content or {}).get(part)
    return content


def _known_keys(location: list[str | int]) -> str:
    model: type[BaseModel] | None = Dataset
    for part in location[:-1]:
        if isinstance(part, str) and model is not None:
            model = _SECTIONS.get(part)
    known = sorted(model.model_fields) if model else []
    near = get_close_matches(str(location[-1]), known, n=1)
    return f"`{near[0]}`?" if near else f"one of {', '.join(known)}"


_SECTIONS: dict[str, type[BaseModel]] = {
    "schedule": AssetSchedule,
    "source": Source,
    "target": Target,
    "llm": LLM,
    "price": Price,
    "tags": Tag,
    "examples": Example,
    "lock": Lock,
    "limits": Limits,
    "retention": Retention,
    "shards": Shards,
    "alerts": Alerts,
    "tasks": Tasks,
    **dict.fromkeys(Tasks.model_fields, Task),
}


def _kind(value: Any) -> str:
    """Return what a value is, without the value."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "keys " + ", ".join(map(str, value)) if value else "no keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**80:
        return "a number of very many digits"
    shown = repr(value) if isinstance(value, str) else str(value)
    name = _TYPE_NAMES.get(type(value))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{shown} ({name})" if name and not isinstance(value, str) else shown
